"""The stages of training the demo's FLUX: autoencoder, text encoders, transformer, guidance, LoRA."""
