"""Tasks of lm-eval over a local file: a choice, the likelihood of a text, and a written answer."""

import json
from pathlib import Path

ROWS = [
    {"q": f"Is {n} even?", "label": n % 2, "text": f"{n} is {'odd' if n % 2 else 'even'}. " * (1 + n)}
    for n in range(12)
]
CHOICE = """task: local_choice
output_type: multiple_choice
doc_to_text: "{{q}}"
doc_to_choice: ["yes", "no, it is odd", "no"]
doc_to_target: label
metric_list: [{metric: acc}, {metric: acc_norm}]
"""
ROLLING = """task: local_rolling
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: bits_per_byte}]
"""
WRITING = """task: local_writing
output_type: generate_until
doc_to_text: "{{q}} "
doc_to_target: "{{text}}"
generation_kwargs: {until: ["\\n"], max_gen_toks: 8}
metric_list: [{metric: exact_match}]
"""


def write_tasks(folder: Path) -> Path:
    """Write the rows and the tasks local_choice, local_rolling and local_writing; return the tasks' folder."""
    rows = folder / "rows.jsonl"
    rows.write_text("".join(f"{json.dumps(row)}\n" for row in ROWS))
    where = f"dataset_path: json\ndataset_kwargs: {{data_files: {{test: {rows}}}}}\ntest_split: test\n"
    tasks = folder / "tasks"
    tasks.mkdir()
    for text in (CHOICE, ROLLING, WRITING):
        name = text.splitlines()[0].removeprefix("task: ")
        (tasks / f"{name}.yaml").write_text(text + where)
    return tasks
