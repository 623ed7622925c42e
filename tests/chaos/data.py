"""R17: a run that is killed repeatedly still sees every window of the text exactly once per epoch."""

from collections import Counter

from tests.chaos.workload import Workload, outcome


def epochs(workload: Workload) -> tuple[list[str], int]:
    """Return the errors in the rows of a finished run, and the number of whole epochs that it has read."""
    seen = Counter(outcome(workload).rows.values())
    wrong = [f"{window} was seen {times} times" for window, times in seen.items() if times != 1]
    sizes: dict[str, dict[int, int]] = {}
    for window in seen:
        domain, epoch, _ = window.split(":")
        sizes.setdefault(domain, {}).setdefault(int(epoch), 0)
        sizes[domain][int(epoch)] += 1
    num_epochs = 0
    for domain, by_epoch in sizes.items():
        whole = [size for epoch, size in by_epoch.items() if epoch < max(by_epoch)]
        num_epochs += len(whole)
        if len(set(whole)) > 1 or by_epoch[max(by_epoch)] > max(whole, default=by_epoch[max(by_epoch)]):
            wrong.append(f"domain {domain}: epochs of {by_epoch} windows")
    return wrong, num_epochs
