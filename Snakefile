"""IProX-flow: from a pool of instructions to a ranking, a selection and a fine-tuned model.

The order of a study, a rule each; every arrow is a file:

    pool, task, target ─> split ─> warmup ─> probe ─> decomposition ─> factors ─> proxy
    (`sparsity: auto` puts a stage sparsity before factors, which tries proxies)
      ─> query ─> features (shards) ─> ranking ─> selection ─> finetune ─> evaluation ─> report
                                     └> fidelity (proxy against target)
    for second-order influence, between query and features: covariance (shards) ─> curvature
      ─> eigenvalues (shards) ─> direction; for influence across two trainings also of the model
      of a second warmup, on a pool of its own
    for a scorer that learns: query_sketches and features of a slice ─> encoder (from backbone)
      ─> embeddings (shards), query_embeddings ─> ranking

Where influence is summed over checkpoints, checkpoint takes the weights of each earlier epoch out of
warmup, and what follows it, up to features, is done at each of them.

A proxy of whole blocks is made by extraction alone, in place of probe to proxy; another model has a
target and a warmup of its own.

Run `snakemake` for everything, or one of: rankings, fidelities, selections, report; and, apart
from any study, f3: what IPSVD keeps of a small network's influence, beside plain SVD. `faithfulness`
judges a study's runs by retraining a tiny model on random subsets of its pool; m1 and m2 trace a
tiny model's answers to the text it was trained on first.
"""

from snakemake.utils import min_version

min_version("9.14")

if "study" not in config:

    configfile: "config/config.yaml"


include: "workflow/rules/common.smk"
include: "workflow/rules/resources.smk"
include: "workflow/rules/inputs.smk"
include: "workflow/rules/proxy.smk"
include: "workflow/rules/curvature.smk"
include: "workflow/rules/influence.smk"
include: "workflow/rules/encoder.smk"
include: "workflow/rules/outcome.smk"
include: "workflow/rules/papers.smk"


localrules:
    all,
    f3,
    faithfulness,
    m1,
    m2,
    rankings,
    fidelities,
    selections,
    report,
    study_index,
    split,
    selection,
    fidelity,
    features,
    paper_table,
    embeddings,
    covariance,
    eigenvalues,


rule all:
    default_target: True
    input:
        rules.study_index.output,
        rules.report.input,


rule rankings:
    input:
        rules.study_index.output,
        manifests_of("ranking"),


rule fidelities:
    input:
        rules.study_index.output,
        manifests_of("fidelity"),


rule selections:
    input:
        rules.study_index.output,
        manifests_of("selection"),
