"""What is mended around a quantized model, not in its layers."""
