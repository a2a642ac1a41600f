"""What a model is for, and the names of its classes, in the terms of `config.json`."""

from collections.abc import Mapping, Sequence
from typing import Any

CLASSIFY = "sequence-classification"
REGRESS = "regression"
TAG = "token-classification"
ANSWER = "question-answering"
EMBED = "embedding"

# What follows the model's name in transformers' name of its class with a head for the task.
SUFFIXES = {
    CLASSIFY: "ForSequenceClassification",
    REGRESS: "ForSequenceClassification",
    TAG: "ForTokenClassification",
    ANSWER: "ForQuestionAnswering",
    EMBED: "Model",
}


def task_of(
    values: Mapping[str, Any], task: str | None, tasks: Sequence[str] = tuple(SUFFIXES)
) -> str | None:
    """The task asked for, or the one that `architectures` in `config.json` names.

    Args:
        values: the parsed `config.json`.
        task: what was asked for, or None.
        tasks: those that the model can do.

    Returns:
        One of `tasks`, or None for a bare model.

    Raises:
        ValueError: the model cannot do the task.

    Example:
        >>> task_of({"architectures": ["BertForTokenClassification"]}, None)
        'token-classification'
    """
    if task is not None and task not in tasks:
        raise ValueError(
            f"task={task!r} is not supported for model_type={values.get('model_type')!r}. "
            f"Supported: {', '.join(map(repr, tasks))}, or None for what config.json says."
        )
    if task is not None:
        return task
    named = (values.get("architectures") or [""])[0]
    found = next((t for t in tasks if t != EMBED and named.endswith(SUFFIXES.get(t, "-"))), None)
    if found == CLASSIFY and REGRESS in tasks and values.get("problem_type") == REGRESS:
        return REGRESS
    return found


def labels_of(values: Mapping[str, Any], labels: Sequence[str] | int | None) -> tuple[str, ...]:
    """The names of a classifier's classes.

    Args:
        values: the parsed `config.json`, with `id2label`, `num_labels` or neither (two classes).
        labels: the names or their number, which come before the file's; None for the file's.

    Returns:
        The names, in the order of the logits.

    Raises:
        ValueError: there is no name, or one is there twice.

    Example:
        >>> labels_of({"id2label": {"0": "no", "1": "yes"}}, None), labels_of({}, 1)
        (('no', 'yes'), ('LABEL_0',))
    """
    named = values.get("id2label")
    if labels is None and named:
        return tuple(str(label) for _, label in sorted((int(i), x) for i, x in named.items()))
    if labels is None:
        labels = int(values.get("num_labels", 2))
    names = [f"LABEL_{i}" for i in range(labels)] if isinstance(labels, int) else list(labels)
    if not names or isinstance(labels, str) or len(set(names)) < len(names):
        raise ValueError(
            f"labels={labels!r} is no list of one or more different names. Give one for each "
            "class, such as labels=['no', 'yes'], or how many there are."
        )
    return tuple(names)


def labels_to_hf(labels: Sequence[str]) -> dict[str, Any]:
    """`id2label` and `label2id` of `config.json`; nothing when there are no labels.

    >>> labels_to_hf(["no", "yes"])["label2id"]
    {'no': 0, 'yes': 1}
    """
    if not labels:
        return {}
    return {
        "id2label": {str(i): label for i, label in enumerate(labels)},
        "label2id": {label: i for i, label in enumerate(labels)},
    }


def check_option(values: Mapping[str, Any], name: str, supported: Sequence[Any]) -> None:
    """That an option of `config.json` is absent or has one of the supported values."""
    if name in values and values[name] not in supported:
        raise ValueError(
            f"{name}={values[name]!r} is not supported. Supported: "
            f"{', '.join(map(str, supported))}."
        )
