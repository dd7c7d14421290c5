"""Memory and time of a run before it exists: plain arithmetic over facts, and the table that shows it."""

from elite.plan.batch import facts_of
from elite.plan.memory import predict, unoptimized
from elite.plan.plan import Plan, make_plan
from elite.plan.survey import longest_contexts, render_longest, render_tiers
from elite.plan.switches import render_survey, survey
from elite.plan.table import render
from elite.plan.tiers import choose_tier, planned_on_all
from elite.plan.time import model_flops_per_token, step_time

__all__ = [
    "Plan",
    "choose_tier",
    "facts_of",
    "longest_contexts",
    "make_plan",
    "planned_on_all",
    "model_flops_per_token",
    "predict",
    "render",
    "render_longest",
    "render_survey",
    "render_tiers",
    "step_time",
    "survey",
    "unoptimized",
]
