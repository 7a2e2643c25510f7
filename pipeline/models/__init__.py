"""Networks and their weights. Imports torch alone; timm only in ``backbones`` and ``sources``, torchvision in ``sources``."""
