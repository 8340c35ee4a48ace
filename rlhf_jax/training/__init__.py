"""What every algorithm trains with and no algorithm knows: gradients, sharding, checkpoints, metrics, the host loop."""
