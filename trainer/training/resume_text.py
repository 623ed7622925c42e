"""Go on in the text of a run, also after it has changed."""

from pydantic import ValidationError

from trainer.checkpoint.compatible import abridged
from trainer.checkpoint.find_checkpoint import CheckpointHandle
from trainer.config.nodes import shown
from trainer.data.batches.text_order import DomainOrder, TextOrder, continued_order, describe_change, restarted_order
from trainer.errors import CheckpointError, DataError
from trainer.training.run import RunState


def resume_text(run: RunState, checkpoint: CheckpointHandle) -> bool:
    """Set the stream of a run, whose position is known, to a checkpoint's; return whether the text is another.

    Raises:
        CheckpointError: if the checkpoint's record of its text is malformed.
        DataError: if the run was trained on other text, and `data.changed` does not say how to go on.
    """
    how, before, now = run.config.data.changed, checkpoint.run["data_fingerprint"], run.corpus.fingerprint
    saved, streams = _saved_order(checkpoint, run.position), checkpoint.run.get("streams", {})
    if before in (None, now):  # None: no text has been read yet, so it may be any
        run.stream.resume_at(streams, None if before is None else saved)
        return False
    if how is None:
        raise DataError(
            f"{checkpoint.path}: was trained on other text than data.sources, data.split and data.fold give now "
            f"(fingerprint {abridged(before)}, now {abridged(now)}); restore the files, or set data.changed: "
            "continue (each domain goes on where it was) or restart (the new text from its beginning), or start a new "
            "run with name=..."
        )
    contents = dict(zip(run.corpus.domains, run.corpus.contents, strict=True))
    named = zip(run.corpus.domains, run.corpus.streams, strict=True)
    is_stream = {name for name, stream in named if stream is not None}
    saved = saved or _order_by_shares(run, is_stream)
    run.console.warning(describe_change(how, saved, contents, position=run.position, streams=is_stream))
    if how == "restart":
        run.stream.resume_at({}, restarted_order(position=run.position))
        return True
    order = continued_order(saved, contents, position=run.position, streams=is_stream)
    same = {name for name, domain in saved.domains.items() if domain.content == contents.get(name)}
    run.stream.resume_at({name: value for name, value in streams.items() if name in same}, order)
    return True


def _saved_order(checkpoint: CheckpointHandle, position: int) -> TextOrder | None:
    """Return the order that a checkpoint records; None if an earlier version wrote it."""
    record = checkpoint.run.get("text")
    if record is None:
        return None
    try:
        order = TextOrder.model_validate(record)
        if order.start <= position:
            return order
    except ValidationError:
        pass
    raise CheckpointError(f"{checkpoint.path}: is invalid: run.text is {shown(record)}; it is the order of a text")


def _order_by_shares(run: RunState, streams: set[str]) -> TextOrder:
    """Return an order for the checkpoint of an earlier version, as if all rows so far had been read of this text."""
    visits = run.stream.text_order(run.position).domains
    return TextOrder(
        domains={
            name: DomainOrder(key=domain.key, visits=domain.visits)
            for name, domain in visits.items()
            if name not in streams
        }
    )
