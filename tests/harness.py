"""Scores rows of tasks with lm-evaluation-harness itself, for comparison with `atom eval-tasks`.

    python harness.py --model DIR --out FILE [--tasks-dir DIR] [--tasks piqa,arc_easy,...] [--limit N]
                      [--batch-size N] [--rows FILE]

Needs lm_eval 0.4.13, torch and transformers, which nothing else here does: what the tests compare with is committed in
tests/harness/, made by this script. Rows are read from DIR/NAME.jsonl in the forms that docs/tasks.md describes and
given the columns of the Hub's data sets; templates, metrics and scoring are the harness's own, read from its package.
The model runs in float32 on the CPU. No network is used.

--out gets one JSON object: for each task its metrics, its seconds, and each row's log likelihoods. With --rows the
rows that were asked are written too, in the Hub's columns and as one object, for tests without the data.
"""

import argparse
import json
import os
import tempfile
import time
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

# Task -> the harness's own file of it, and the split that it asks.
TASKS = {
    "piqa": ("piqa/piqa.yaml", "validation"),
    "arc_easy": ("arc/arc_easy.yaml", "test"),
    "arc_challenge": ("arc/arc_challenge.yaml", "test"),
    "boolq": ("super_glue/boolq/default.yaml", "validation"),
    "hellaswag": ("hellaswag/hellaswag.yaml", "validation"),
    "winogrande": ("winogrande/default.yaml", "validation"),
    "lambada": ("lambada/lambada_openai.yaml", "test"),
}


def hub_columns(task, row):
    """A row put together already, in the columns that the harness's template reads."""
    if task == "piqa" and "query" in row:
        goal = row["query"].removeprefix("Question: ").removesuffix("\n")
        first, second = row["choices"]
        return {"goal": goal, "sol1": first, "sol2": second, "label": row["gold"]}
    if task.startswith("arc") and "query" in row:
        labels = "ABCDEFGH"[: len(row["choices"])]
        return {
            "question": row["query"].removeprefix("Question: ").removesuffix("\n"),
            "choices": {"text": row["choices"], "label": list(labels)},
            "answerKey": labels[row["gold"]],
        }
    if task == "lambada" and "context" in row:
        return {"text": row["context"] + " " + row["continuation"]}
    return row


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True)
    parser.add_argument("--out", required=True)
    parser.add_argument("--tasks-dir", required=True)
    parser.add_argument("--tasks", default="piqa,arc_easy")
    parser.add_argument("--limit", type=int)
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--rows")
    arguments = parser.parse_args()

    import lm_eval
    import torch
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager
    from transformers import PreTrainedTokenizerFast

    package = Path(lm_eval.__file__).parent
    names = arguments.tasks.split(",")
    found = {"lm_eval": lm_eval.__version__, "model": Path(arguments.model).name, "tasks": {}}
    asked = {}
    # As tokenizer.json has it. transformers 5 rebuilds a tokenizer of a known class, such as SmolLM2's GPT2Tokenizer,
    # from the vocabulary and loses the rest of the file (in which SmolLM2's digits are split one by one).
    tokenizer = PreTrainedTokenizerFast.from_pretrained(arguments.model)
    model = HFLM(
        pretrained=arguments.model,
        tokenizer=tokenizer,
        device="cpu",
        dtype=torch.float32,
        # In float32 torch's log_softmax is off by some 8e-6 nats a token, always to the same side.
        softmax_dtype=torch.float64,
        batch_size=arguments.batch_size,
    )
    with tempfile.TemporaryDirectory() as home:
        home = Path(home)
        for name in names:
            lines = (Path(arguments.tasks_dir) / f"{name}.jsonl").read_text().splitlines()
            rows = [hub_columns(name, json.loads(line)) for line in lines if line.strip()]
            asked[name] = rows = rows[: arguments.limit]
            file = home / f"{name}.jsonl"
            file.write_text("".join(json.dumps(row) + "\n" for row in rows))
            template, split = TASKS[name]
            # Everything but where the rows come from is the harness's.
            (home / f"{name}.yaml").write_text(
                f"include: {package / 'tasks' / template}\n"
                f"task: local_{name}\n"
                "tag: null\n"
                "dataset_path: json\n"
                "dataset_name: null\n"
                f"dataset_kwargs: {{data_files: {{{split}: {file}}}}}\n"
                "training_split: null\n"
                f"validation_split: {'validation' if split == 'validation' else 'null'}\n"
                f"test_split: {'test' if split == 'test' else 'null'}\n"
            )
        manager = TaskManager(include_path=str(home), include_defaults=False)
        for name in names:
            start = time.monotonic()
            cpu = time.process_time()
            result = lm_eval.simple_evaluate(
                model=model,
                tasks=[f"local_{name}"],
                task_manager=manager,
                bootstrap_iters=0,
                log_samples=True,
            )
            seconds, cpu = time.monotonic() - start, time.process_time() - cpu
            metrics = result["results"][f"local_{name}"]
            samples = sorted(result["samples"][f"local_{name}"], key=lambda sample: sample["doc_id"])
            found["tasks"][name] = {
                "rows": len(samples),
                "seconds": round(seconds, 2),
                "cpu_seconds": round(cpu, 2),
                "metrics": {
                    key.removesuffix(",none"): value
                    for key, value in metrics.items()
                    if isinstance(value, float)
                },
                "log_likelihoods": [
                    [round(float(answer[0][0]), 5) for answer in sample["resps"]] for sample in samples
                ],
                "greedy": [[bool(answer[0][1]) for answer in sample["resps"]] for sample in samples],
            }
            print(name, len(samples), "rows", f"{seconds:.1f} s", f"{cpu:.1f} CPU s", metrics)
    Path(arguments.out).write_text(json.dumps(found, indent=None) + "\n")
    if arguments.rows:
        Path(arguments.rows).write_text(json.dumps(asked, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
