"""Runs that an older version began."""

import json

from elite import geometry
from elite.plan import make_plan
from elite.prepared import completed
from tests.plan.helpers import CORPUS, STANDARD, device, run_config


def test_an_older_plan_is_completed_and_what_it_says_stays() -> None:
    config, machine = run_config(4096, STANDARD), device("rtx3090")
    whole = json.loads(json.dumps(make_plan(config, machine, geometry.shape(config.model), CORPUS).to_dict()))
    assert completed(whole, config, machine) is whole
    known = ("model", "corpus", "micro_batch", "accumulation", "steps", "usable_bytes", "total_bytes")
    older = {name: whole[name] for name in known} | {"total_bytes": 1.0}
    made = json.loads(json.dumps(completed(older, config, machine)))
    assert made == whole | {"total_bytes": 1.0}
