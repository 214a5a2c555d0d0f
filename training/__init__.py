"""EDM's side: networks, losses, data, augmentation, samplers, scores and the training loop."""
