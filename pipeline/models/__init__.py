"""Networks and their weights, in torch; timm in ``backbones`` and ``sources`` alone, torchvision in ``sources``."""
