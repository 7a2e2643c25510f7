"""What a run starts from, weights or a checkpoint, and what that decides of its settings."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jsonargparse import Namespace

from pipeline.checkpoints import existing_checkpoint, is_trained_to_the_end, read_checkpoint
from pipeline.errors import UserError
from pipeline.finetuning.strategy import FROZEN
from pipeline.models.files import LINEAGE, read_facts
from pipeline.models.sources import REGISTRY
from pipeline.models.weights import Lineage, preprocessing_record
from pipeline.planning.plan import Plan
from pipeline.precision import pick_precision
from pipeline.registry.weights import registered_weights
from pipeline.runs import LAST, PLAN, PLANNED, find_resumable


@dataclass(frozen=True)
class Origin:
    """What a run starts from.

    Attributes:
        checkpoint: that it goes on from, or evaluates; None: it starts from weights.
        resumed: of the interrupted run that it is the rest of, how that is tracked; None: it is a run of its own.
        lineage: of the weights, where something is known that the weights themselves do not say.
        plan: of the run that ``fit`` goes on from; None where no command of ours has written its checkpoint.
    """

    checkpoint: Path | None = None
    resumed: dict[str, Any] | None = None
    lineage: Lineage | None = None
    plan: Plan | None = None

    @property
    def begins_from_checkpoint(self) -> bool:
        """Whether a run of its own begins from a checkpoint of another one."""
        return self.checkpoint is not None and not self.resumed

    def plan_kept(self, settings: Namespace) -> Plan | None:
        """What was chosen for the run that is gone on with, but for what is set now; None where nothing was.

        Raises:
            UserError: a budget is set, which a plan that is kept cannot follow.
        """
        if self.plan is None:
            return None
        if settings.budget is not None and not self.resumed:
            raise UserError(
                f"--budget: expected none for a run that goes on from '{self.checkpoint}' and keeps what was "
                f"chosen for it, found '{settings.budget}'; leave it out, and set what is to change, such as "
                "trainer.max_epochs."
            )
        plan = self.plan.taken_over(settings)
        if not self.resumed and "trainer.precision" in self.plan.values:  # and nobody had set it
            plan = plan.on_another_machine(*pick_precision(str(settings.trainer.accelerator)))
        return plan

    def require_epochs_left(self, epochs: int) -> None:
        """Refuse a checkpoint of which nothing is left to train.

        Args:
            epochs: how many are asked for.

        Raises:
            UserError: the checkpoint has as many behind it.
        """
        # A run that was interrupted when all was trained still has its tests before it.
        if not self.begins_from_checkpoint:
            return
        assert self.checkpoint is not None
        if is_trained_to_the_end(read_checkpoint(self.checkpoint), epochs):
            raise UserError(
                f"--ckpt_path: expected a checkpoint with less than trainer.max_epochs={epochs} epochs behind it, "
                f"found '{self.checkpoint}' done with them; raise trainer.max_epochs, or use `test`."
            )


def origin_of_fit(settings: Namespace, given: str | None, written: str, scratch: Path) -> Origin:
    """Find what a run of ``fit`` starts from, and settle what follows from it.

    Args:
        settings: of ``fit``; what the origin decides is set in them.
        given: a checkpoint, its run's folder, or ``last``, as ``--ckpt_path`` has it; None: the weights of the
            settings.
        written: the settings as a run's folder keeps them, by which ``last`` is found.
        scratch: folder for weights that are fetched from a registry.

    Raises:
        UserError: there is no such checkpoint, or none of this network; or no such weights.
    """
    data, model = settings.data.init_args, settings.model
    if given is None:
        lineage = None
        if model.weights is not None and model.weights.startswith(REGISTRY):
            address, path = registered_weights(model.weights, settings.logger.tracking_uri, scratch)
            facts = read_facts(path)
            lineage = Lineage(address, facts.source or address, facts.licence)
            model.weights = str(path)
        data.preprocessing = preprocessing_record(model.backbone, model.weights)
        return Origin(lineage=lineage)
    resumed = None
    if given == "last":
        folder, resumed = find_resumable(written)
        checkpoint = folder / LAST
    else:
        checkpoint = existing_checkpoint(given, in_folder=LAST)
    content = read_checkpoint(checkpoint)
    hparams = content["hyper_parameters"]
    # Earlier releases had heads of one kind, of which their checkpoints say nothing.
    network = {"backbone": hparams["backbone"], "head_stages": hparams.get("head_stages", 1)}
    for name, found in network.items():
        if model[name] not in ("auto", found):
            raise UserError(
                f"--ckpt_path: expected a checkpoint of model.{name} '{model[name]}', found one of '{found}' in "
                f"'{checkpoint}'; set model.{name} to it."
            )
    # Weights start a run; this one goes on from a checkpoint, which also says how its images were prepared.
    model.weights = None
    data.preprocessing = hparams["preprocessing"]
    plan = _plan_of(checkpoint, content)
    if plan is None:
        _keep_as_trained(settings, hparams | network, bool(content.get(FROZEN)))
    return Origin(checkpoint, resumed, Lineage(**content[LINEAGE]), plan)


def _keep_as_trained(settings: Namespace, hparams: dict[str, Any], freezes: bool) -> None:
    """What a checkpoint knows of the choices made for it, where nobody sets something else."""
    data, model = settings.data.init_args, settings.model
    for name in ("learning_rate", "head_learning_rate", "head_stages", "batch_norm", "test_time_augmentation"):
        if model[name] == "auto" and name in hparams:  # of earlier releases' checkpoints not all are
            model[name] = hparams[name]
    for name, recorded in (("image_size", "size"), ("crop_fraction", "crop")):
        if data[name] == "auto":
            data[name] = hparams["preprocessing"][recorded]
    if settings.finetuning is None:  # its head is trained, and is not solved again
        settings.finetuning = _named("ProbeThenFineTune" if freezes else "FullFineTuning")


def origin_of_evaluation(settings: Namespace, given: str | None, arguments: Sequence[str]) -> Origin:
    """Take the network, its classes and its preprocessing from the checkpoint that is to be evaluated.

    Args:
        settings: of ``validate``, ``test`` or ``predict``; what the checkpoint decides is set in them.
        given: the checkpoint, or its run's folder, as ``--ckpt_path`` has it.
        arguments: of the command line; how many views are averaged is a choice of who evaluates.

    Raises:
        UserError: there is no such checkpoint.
    """
    checkpoint = existing_checkpoint(given)
    content = read_checkpoint(checkpoint)
    hparams = dict(content["hyper_parameters"])
    data, model = settings.data.init_args, settings.model
    plan = _plan_of(checkpoint, content)
    if data.val_fraction == "auto" and plan is not None:  # the same images test
        data.val_fraction = plan.value_of("data.init_args.val_fraction", "auto")
    data.classes, data.preprocessing = hparams.pop("classes"), hparams.pop("preprocessing")
    data.multi_label = hparams.get("multi_label", False)
    data.image_size = data.crop_fraction = "auto"
    # The record says it, and it wins.
    data.channels = data.preprocessing["channels"]
    data.dtype = data.preprocessing.get("dtype", "uint8")
    model.weights = None
    if any(argument.split("=")[0] == "--model.test_time_augmentation" for argument in arguments):
        hparams.pop("test_time_augmentation", None)
    for name, value in hparams.items():
        if name in model:  # earlier releases knew more settings
            model[name] = value
    settings.finetuning = _named("FullFineTuning")  # a strategy has to be named, and none is needed
    return Origin(checkpoint)


def _named(strategy: str) -> Namespace:
    return Namespace(class_path=f"pipeline.finetuning.{strategy}", init_args=Namespace())


def _plan_of(checkpoint: Path, content: dict[str, Any]) -> Plan | None:
    beside = checkpoint.parent / PLAN  # where alone it was, once
    written = content.get(PLANNED) or (beside.read_text(encoding="utf-8") if beside.is_file() else None)
    return None if written is None else Plan.from_json(written)
