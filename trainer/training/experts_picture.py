"""The picture of the experts by domain in the run folder."""

from trainer.atomic_io import replace_file
from trainer.checkpoint.run_folder import RunFolder
from trainer.console.expert_map_svg import expert_map_svg
from trainer.console.summary import RunSummary


def write_experts_picture(folder: RunFolder, summary: RunSummary) -> list[tuple[str, str]]:
    """Write the experts of a summary as SVG; return label and path of the file, nothing for a dense model.

    Raises:
        OSError: if the disk refuses.
    """
    if summary.experts is None:
        return []
    experts, title = summary.experts, f"{summary.title}: experts by domain"
    replace_file(
        folder.experts_picture, expert_map_svg(experts.counts, experts.domains, experts.layer_names, title=title)
    )
    return [("experts", str(folder.experts_picture))]
