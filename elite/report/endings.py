"""What a run's summary says that is not as usual: an early end, what went wrong and was overcome, other weights than the trained ones."""

from typing import Any

from elite.training.stability import Setbacks

TRAINED = "the trained weights"
"""What `final/` holds where nothing else is exported."""


def unusual(summary: dict[str, Any]) -> list[str]:
    """A line each; none for a run that took its steps and nothing else."""
    lines = []
    if summary["ended_by"]:
        kept = summary["best_checkpoint"] or "none: no validation was better than the one before the first step"
        lines.append(
            f"ended early  by {summary['ended_by']} after {summary['steps']} of {summary['planned_steps']} steps: "
            f"{_counted(summary['acted'][summary['ended_by']])}; best checkpoint: {kept}"
        )
    lines += [f"{name}  {_counted(counts)}" for name, counts in summary["acted"].items() if name != summary["ended_by"] and counts]
    setbacks = {name: summary[name] for name in Setbacks().counts() if summary[name]}
    lines += [f"bad numbers  {_counted(setbacks)}"] if setbacks else []
    if summary["oom_recoveries"]:
        chunk = f", chunks of {summary['chunk']:,} tokens" if summary["chunk"] else ""
        lines.append(f"out of memory  {summary['oom_recoveries']} times, and went on: now {summary['micro_batch']} rows in a pass{chunk}")
    if summary["final_weights"] != TRAINED:
        lines.append(f"final/ holds {summary['final_weights']}; checkpoints hold the trained ones")
    return lines


def _counted(counts: dict[str, float]) -> str:
    return ", ".join(f"{name.replace('_', ' ')} {value:{',' if isinstance(value, int) else '.4g'}}" for name, value in counts.items())
