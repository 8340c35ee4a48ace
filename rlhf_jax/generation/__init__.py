"""From a model to text: one compiled loop, the transformations of logits, how a token is drawn."""
