"""How each part of pico is trained, in the order of `worker.pico.train`: VAE, text encoder, denoiser."""
