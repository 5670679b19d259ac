"""Differential privacy: what a run guarantees, and what an attack on it finds."""

from fedsys.privacy.accounting import (
    AccountingError,
    Figures,
    Release,
    Spent,
    Statement,
    check,
    check_delta,
    epsilon,
    largest,
    merged,
    noise_multiplier,
    prv_epsilon,
    rdp_epsilon,
    upper_bound,
)

__all__ = [
    "AccountingError",
    "Figures",
    "Release",
    "Spent",
    "Statement",
    "check",
    "check_delta",
    "epsilon",
    "largest",
    "merged",
    "noise_multiplier",
    "prv_epsilon",
    "rdp_epsilon",
    "upper_bound",
]
