"""Fine-tune a pretrained ResNet on labelled images: the application behind ``python -m pipeline``."""
