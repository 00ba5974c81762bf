"""LoRA adapters, mixed in a batch: low-rank products beside the model's weights, for each batch row its own."""
