"""fastai's ``vision_learner`` and ``fine_tune``: the head alone for an epoch, then everything, by one-cycle AdamW.

Images are made large on the processor and cropped and warped to size in batches, as its documentation advises
(https://docs.fast.ai/tutorial.vision.html: ``Resize(460)`` with ``aug_transforms(size=224)``).
"""

import pandas as pd
from common import BATCH, WORKERS, pretrained, read_job
from fastai.vision.all import (
    CategoryBlock,
    ColReader,
    DataBlock,
    ImageBlock,
    IndexSplitter,
    Normalize,
    Resize,
    aug_transforms,
    imagenet_stats,
    vision_learner,
)
from torch import nn
from torchvision import models


def main() -> None:
    job = read_job(__doc__)
    block = DataBlock(
        blocks=(ImageBlock, CategoryBlock(vocab=job.classes)),
        get_x=ColReader("path"),
        get_y=ColReader("label"),
        splitter=IndexSplitter([]),  # nothing validates
        item_tfms=Resize(round(job.size * 460 / 224)),
        batch_tfms=[*aug_transforms(size=job.size), Normalize.from_stats(*imagenet_stats)],
    )
    loaders = block.dataloaders(pd.DataFrame(job.train, columns=["path", "label"]), bs=BATCH, num_workers=WORKERS)
    # `pretrained=True` would fetch other weights. What else it does is to normalise, above, and to freeze the body,
    # which fine_tune begins with.
    learner = vision_learner(loaders, getattr(models, job.backbone), pretrained=False)
    learner.model[0].load_state_dict(nn.Sequential(*list(pretrained(job).children())[:-2]).state_dict())
    learner.fine_tune(job.epochs)
    probabilities, _ = learner.get_preds(dl=loaders.test_dl([path for path, _ in job.test]))
    job.write(probabilities)


if __name__ == "__main__":
    main()
