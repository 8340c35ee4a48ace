"""Where texts come from and how they become batches: verified downloads, tokenizers, padding, resumable order."""
