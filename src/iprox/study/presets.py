"""Named starting values of the method: which published variant a run follows.

``default`` is this project's choice and needs no entry: it is the schema's defaults.
"""

from __future__ import annotations

from typing import Any

PRESETS: dict[str, dict[str, Any]] = {
    "default": {},
    # The text of arXiv:2602.17835 and its appendix F: the solution restricted to the probe
    # spans, an absolute ridge of 1e-3 on both sides, the scale split evenly in the weighted space.
    "paper": {
        "probe": {"tokens": "rank"},
        "proxy": {
            "passes": "both",
            "whiten": "both",
            "mode": "paper",
            "damping_mode": "absolute",
            "damping": 1e-3,
            "gauge": "paper",
            "rank_multiple": 128,
        },
        "align": {
            "epochs": 5.0,
            "recover_epochs": 0.0,
            "lr": 5e-5,
            "lambda_kl": 0.1,
            "select_by": "objective",
            "rebalance": False,
        },
    },
    # The authors' published code, where it differs from the text: language-model loss over all
    # tokens in the probe, 1024 tokens, temperature 2, half weight per distance, lr 1e-4.
    "reference": {
        "probe": {"tokens": 1024, "labels": "all"},
        "proxy": {
            "passes": "both",
            "whiten": "both",
            "mode": "paper",
            "damping_mode": "absolute",
            "damping": 1e-3,
            "gauge": "paper",
            "rank_multiple": 128,
            "rank_rounding": "round_ceil",
            "dense_rule": "min_dim",
        },
        "align": {
            "epochs": 5.0,
            "recover_epochs": 0.0,
            "lr": 1e-4,
            "lambda_kl": 0.1,
            "tau": 2.0,
            "distance_weight": 0.5,
            "select_by": "last",
            "rebalance": False,
        },
    },
}
