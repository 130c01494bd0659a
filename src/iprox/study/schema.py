"""Every key of a study file: its type, range, default and meaning, once.

The JSON schema under ``workflow/schemas`` and the table in ``config/README.md`` are generated
from these classes (``iprox schema``), and a test fails when they drift. A stage receives its
own section as one of these objects, so a stage never looks up a key by name.

Keys that change results are part of a stage's identity (see ``iprox.plan``). Keys that do
not (threads, devices, shard sizes) are not here but in the workflow's profiles, except
``data_dir``, ``shards``, ``train_gpus`` and ``report``, which the plan keeps out of every identity.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from iprox.study.estimators import ESTIMATORS
from iprox.study.scorers import SCORERS

if TYPE_CHECKING:
    EstimatorName = str
    ScorerName = str
else:
    EstimatorName = Literal[tuple(ESTIMATORS)]
    ScorerName = Literal[tuple(SCORERS)]

Fraction = Annotated[float, Field(gt=0, le=1)]
Size = Annotated[int | float, Field(gt=0)]
"""A number of examples: an integer counts them, a float up to 1.0 is a share of the pool."""

NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"
Name = Annotated[str, Field(pattern=NAME)]


class Section(BaseModel):
    """Base of all sections: unknown keys are errors, values cannot be changed after loading."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False
    )


class Hub(Section):
    """A data set on the Hugging Face hub."""

    name: str = Field(description="Data set name, for example databricks/databricks-dolly-15k.")
    config: str | None = Field(None, description="Configuration of the data set.")
    split: str = Field("train", description="Split to read.")
    revision: str | None = Field(None, description="Commit or tag; pin it to make reruns exact.")


class Package(Section):
    """A file inside a pinned source package of the Python package index."""

    requirement: str = Field(
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*==[A-Za-z0-9.+!]+$",
        description="Pinned package, for example llamafactory==0.9.5.",
    )
    member: str = Field(description="Path of the file inside the source archive.")
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$", description="Digest of that file.")


class TargetSection(Section):
    """The language model that is fine-tuned in the end."""

    model: str = Field(
        "smollm2-135m",
        description="smollm2-135m or gemma3-270m (from pinned packages), a hub name, or a folder "
        "relative to data_dir.",
    )
    revision: str | None = Field(None, description="Hub commit or tag.")
    dtype: Literal["float32", "bfloat16"] = Field(
        "float32", description="Precision of the weights in every pass that measures influence."
    )
    attention: Literal["sdpa", "eager", "flash_attention_2"] = Field(
        "sdpa", description="Attention kernel of first-order passes."
    )
    compile: bool = Field(
        False,
        description="Compile what lies between the linear layers (norms, activations) with "
        "torch.compile where gradients are scored; needs a C++ compiler. Gains nothing on a CPU, "
        "and has not been measured on a GPU.",
    )
    trust_remote_code: bool = Field(
        False, description="Run Python code that comes with the model. Off unless you read it."
    )


class PoolSection(Section):
    """The candidate examples to choose from: one of name, path, hub or package."""

    name: str | None = Field(None, description="A pool this project knows: alpaca-demo or dolly.")
    path: str | None = Field(
        None, description="A JSONL, JSON, CSV or Parquet file, or a folder of them, below data_dir."
    )
    hub: Hub | None = Field(None, description="A data set on the Hugging Face hub.")
    package: Package | None = Field(None, description="A file inside a pinned source package.")
    format: Literal["auto", "alpaca", "dolly", "messages", "sharegpt", "prompt_response"] = Field(
        "auto", description="Shape of a record; auto detects it and says what it found."
    )
    limit: int | None = Field(
        None,
        gt=0,
        description="Keep a seeded random sample of this many examples; all when absent.",
    )
    max_chars: int | None = Field(
        None, gt=0, description="Leave out longer examples (all turns together); counted."
    )
    on_duplicate: Literal["error", "drop"] = Field(
        "error", description="What to do when two rows carry the same id: stop, or keep the first."
    )
    on_empty: Literal["drop", "error"] = Field(
        "drop", description="What to do with examples whose response is empty; drops are counted."
    )
    seed: int = Field(0, description="Seed of the sample drawn when limit is set.")

    @model_validator(mode="after")
    def _one_source(self) -> PoolSection:
        given = [k for k in ("name", "path", "hub", "package") if getattr(self, k) is not None]
        if len(given) != 1:
            raise ValueError(f"give exactly one of name, path, hub, package; got {given or 'none'}")
        return self


class TaskSection(Section):
    """A benchmark: its development examples are the queries that influence is measured on."""

    name: Name = Field(description="The task's name in tables and file names.")
    kind: Literal["mmlu", "bbh", "tydiqa", "messages", "custom"] = Field(
        description="How records become queries and test items."
    )
    path: str | None = Field(
        None,
        description="File of development examples below data_dir; absent for mmlu and bbh, whose "
        "development examples come with the lm-eval package.",
    )
    hub: Hub | None = Field(
        None, description="Development examples from the hub instead: a data set and its split."
    )
    prompts: str | None = Field(None, description="bbh only: JSON file of 3-shot prompts by task.")
    yaml: str | None = Field(
        None,
        description="custom only: task file of the Language Model Evaluation Harness below "
        "data_dir, which says how records are asked and answered.",
    )
    test: str | None = Field(
        None,
        description="File of test items below data_dir; absent: held-out development examples.",
    )
    test_hub: Hub | None = Field(
        None,
        description="Test items from the hub instead; kind bbh without a configuration: one "
        "configuration for each task.",
    )
    queries: int | None = Field(
        None,
        gt=0,
        description="Use this many queries (seeded, spread over subtasks); all if absent.",
    )
    heldout: int = Field(
        0, ge=0, description="Development examples held out of the queries to measure loss on."
    )
    test_limit: int | None = Field(
        None, gt=0, description="Use this many test items (seeded, spread over subtasks)."
    )
    shots: int | None = Field(
        None,
        ge=0,
        description="Worked examples in each query's prompt; the task's standard if absent.",
    )
    test_prompt: Literal["benchmark", "query"] = Field(
        "benchmark",
        description="mmlu, bbh, tydiqa: test items are asked as the benchmark asks (MMLU and BBH "
        "without chat template), or as the queries are. Losses are always measured as queries.",
    )
    test_shots: int | None = Field(
        None,
        ge=0,
        description="Worked examples before a test item; absent: 5 for mmlu, 3 for bbh, 1 for "
        "tydiqa (as many as there are), or the queries' number with test_prompt query.",
    )
    test_per_subtask: int | None = Field(
        None,
        gt=0,
        description="Test items of a subtask, at most (seeded); absent: 40 for bbh, 200 for "
        "tydiqa, else all.",
    )
    allow_contaminated: bool = Field(
        False, description="Go on when development examples are also test items; listed either way."
    )
    seed: int = Field(0, description="Seed of all draws of this task.")

    @property
    def has_test(self) -> bool:
        """Whether test items are read, beside those held out."""
        return self.test is not None or self.test_hub is not None

    @model_validator(mode="after")
    def _one_source_each(self) -> TaskSection:
        for path, hub in (("path", "hub"), ("test", "test_hub")):
            if getattr(self, path) is not None and getattr(self, hub) is not None:
                raise ValueError(f"give {path} or {hub}, not both")
        return self


class ChatSection(Section):
    """How messages become tokens."""

    template: Literal["tokenizer", "tulu"] = Field(
        "tokenizer", description="The tokenizer's own chat template, or the Tulu tags LESS uses."
    )
    max_length: int = Field(
        2048,
        ge=8,
        description="Tokens per example; longer ones are cut from the right and counted.",
    )


class SplitSection(Section):
    """Which pool examples each stage sees. Integers count examples, floats are shares."""

    warmup: Size = Field(0.05, description="Examples the warm-up trains on.")
    probe: Size = Field(128, description="Examples whose tokens probe the layers.")
    align: Size = Field(128, description="Examples of the alignment, disjoint from the probe's.")
    fidelity: Size = Field(
        256, description="Slice of the pool on which proxy and target are compared."
    )
    fisher: Size = Field(
        1024, description="Examples that curvature is fitted on; read by kfac, ekfac and datainf."
    )
    teach: Size = Field(
        0.2,
        description="Examples a teacher labels for scorers that learn; none is in the fidelity "
        "slice, by id or by text.",
    )
    seed: int = Field(0, description="Seed of all splits; each split is an independent draw.")


class WarmupSection(Section):
    """Short fine-tuning that yields the checkpoint influence is measured at."""

    epochs: float = Field(
        1.0, ge=0, description="Passes over the warm-up examples; 0 skips training."
    )
    lr: float = Field(1e-5, gt=0, description="Peak learning rate of AdamW.")
    weight_decay: float = Field(1e-2, ge=0, description="Weight decay.")
    batch: int = Field(32, gt=0, description="Sequences per optimizer step.")
    lr_warmup: float = Field(
        0.03, ge=0, lt=1, description="Share of steps with rising learning rate."
    )
    freeze_embed_head: bool = Field(True, description="Keep token embedding and head fixed.")
    lora_rank: int = Field(
        0,
        ge=0,
        description="Train low-rank updates of the block linears (LoRA, through peft) and merge "
        "them in the end; scorer less then compares by their gradients, as published. 0: train "
        "all weights.",
    )
    lora_alpha: float = Field(
        16.0, gt=0, description="Scale of LoRA's updates, which is this over the rank."
    )
    seed: int = Field(0, description="Seed of the order of examples.")


class ProbeSection(Section):
    """Token positions at which layer inputs and output gradients are recorded."""

    tokens: int | Literal["rank"] = Field(
        3072,
        description="Token positions N; 'rank' is the paper's rule: the largest rank rounded up to "
        "128, between 512 and 2048.",
    )
    positions: Literal["all", "supervised"] = Field(
        "all",
        description="Draw from all positions that feed a prediction, or supervised ones only.",
    )
    labels: Literal["response", "all"] = Field(
        "response", description="Loss over response tokens, or over all tokens (reference code)."
    )
    redundancy: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="Share of the positions whose rows give way to blends of two others, in all "
        "layers alike: the paper's study of redundant probes.",
    )
    seed: int = Field(0, description="Seed of the positions drawn inside each stratum.")


class LayersSection(Section):
    """Which linear layers are replaced and scored."""

    include: list[str] = Field(
        default=["*"], min_length=1, description="Patterns (shell style) of layer names to take."
    )
    exclude: list[str] = Field(default=[], description="Patterns of layer names to leave dense.")


class ProxySection(Section):
    """The model that scores in the target's place."""

    kind: Literal["target", "ipsvd", "svd", "layers", "model"] = Field(
        "ipsvd",
        description="The target itself, influence-preserving SVD, plain truncated SVD, the blocks "
        "of the target that matter most (layer extraction), or another, smaller model.",
    )
    model: str | None = Field(
        None,
        description="kind model: the model, named as target.model is; it is warmed up as the "
        "target is, and reads texts with its own tokenizer.",
    )
    revision: str | None = Field(None, description="kind model: hub commit or tag.")
    sparsity: Literal["auto"] | Annotated[float, Field(gt=0, lt=1)] = Field(
        0.5,
        description="Share of each replaced layer's parameters removed (kind layers: of blocks); "
        "auto: of 0.1, 0.2, ... 0.9 the highest at which fidelity.floor is met, before alignment.",
    )
    passes: Literal["backward", "both"] = Field(
        "backward",
        description="kinds ipsvd and svd: factors stand in for the weights in the backward pass "
        "alone, so that the forward pass, the query gradients and the layers scored are the "
        "target's own, and there is nothing to align (align is not used); or in both passes, "
        "which costs less and keeps far less of the target's influence.",
    )
    max_cost: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="sparsity auto: most FLOPs of scoring, as a share of the target's.",
    )
    rank_multiple: Literal["auto"] | Annotated[int, Field(ge=1)] = Field(
        "auto",
        description="Ranks are rounded up to a multiple of this; auto: 128, 32, 8 or 1 by size.",
    )
    rank_allocation: Literal["uniform", "global"] = Field(
        "uniform",
        description="The same sparsity in every layer, or its budget of parameters spent where it "
        "removes most of the weighted error; layers then differ in rank, and some stay dense. "
        "Made for kind ipsvd with whiten queries or both, where errors are changes of scores or "
        "of the loss.",
    )
    rank_rounding: Literal["ceil", "round_ceil"] = Field(
        "ceil", description="round_ceil rounds to an integer first, as the reference code does."
    )
    dense_rule: Literal["parameters", "min_dim"] = Field(
        "parameters",
        description="Keep a layer dense when factors would not save parameters, or (reference "
        "code) only when the rank reaches min(out, in).",
    )
    mode: Literal["exact", "paper"] = Field(
        "exact",
        description="Exact damped solution, or the paper's approximation on the probe spans.",
    )
    damping_mode: Literal["relative", "absolute"] = Field(
        "relative", description="Damping as a share of the mean eigenvalue, or as a number."
    )
    damping: float = Field(0.1, ge=0, description="Added to both second moments' eigenvalues.")
    gauge: Literal["balanced", "paper"] = Field(
        "balanced", description="How the two factors share the scale of their product."
    )
    whiten: Literal["auto", "queries", "both", "inputs"] = Field(
        "auto",
        description="kind ipsvd: weight errors by output gradients and by how far inputs move "
        "along the tasks' query gradients, which makes them errors of scores (queries; needs "
        "passes: backward); by output gradients and inputs (both); or by inputs alone, as "
        "compression by activations does. auto: queries for exact features of the backward pass; "
        "else both, so that a sketched pool serves later tasks.",
    )
    objective: Literal["tracin", "influence"] = Field(
        "tracin", description="Weight errors by second moments, or by their inverses (appendix E)."
    )
    layers: LayersSection = Field(LayersSection(), description="Which layers are replaced.")

    @model_validator(mode="after")
    def _names_its_model(self) -> ProxySection:
        if self.kind == "model" and self.model is None:
            raise ValueError("kind model needs proxy.model: the name or folder of a smaller model")
        return self

    @model_validator(mode="after")
    def _only_auto_has_a_ceiling(self) -> ProxySection:
        if self.max_cost is not None and self.sparsity != "auto":
            raise ValueError("max_cost needs sparsity: auto; a given sparsity has the cost it has")
        return self

    @model_validator(mode="after")
    def _only_factors_have_a_sparsity_to_find(self) -> ProxySection:
        if self.kind == "layers" and self.sparsity == "auto":
            raise ValueError("sparsity auto needs kind ipsvd or svd; give kind layers a number")
        return self

    @property
    def share_removed(self) -> float:
        """The sparsity, once it is a number."""
        assert self.sparsity != "auto"
        return self.sparsity

    @property
    def is_factorised(self) -> bool:
        """Whether factors stand in for the target's weights."""
        return self.kind in ("ipsvd", "svd")


class AlignSection(Section):
    """Training of the factors until the proxy's gradients match the target's."""

    epochs: float = Field(
        5.0, ge=0, description="Passes over the align examples; 0 skips alignment."
    )
    recover_epochs: float = Field(
        0.0,
        ge=0,
        description="Passes that first teach the proxy the target's predictions; 0: none.",
    )
    recover_lr: float = Field(2e-4, gt=0, description="Peak learning rate of the recovery.")
    recover_batch: int = Field(4, gt=0, description="Sequences per step of the recovery.")
    lr: float = Field(5e-5, gt=0, description="Learning rate of AdamW.")
    weight_decay: float = Field(0.01, ge=0, description="Weight decay.")
    batch: int = Field(4, gt=0, description="Sequences per step.")
    lambda_kl: float = Field(0.1, ge=0, description="Weight of the anchor to the target's logits.")
    tau: float = Field(1.0, gt=0, description="Temperature of the anchor.")
    kl_positions: Literal["supervised", "all"] = Field(
        "supervised", description="Positions anchored."
    )
    distance_weight: float = Field(
        1.0,
        gt=0,
        description="Factor on the sum of both distances per layer (reference code: 0.5).",
    )
    grad: Literal["exact", "stop_projection"] = Field(
        "exact",
        description="Differentiate through the factors inside the projected target gradient.",
    )
    hvp: Literal["double_backward", "jvp", "central_diff"] = Field(
        "double_backward", description="How the Hessian-vector product is computed."
    )
    clip: float = Field(1.0, gt=0, description="Gradient norm limit.")
    lr_warmup: float = Field(
        0.03, ge=0, lt=1, description="Share of steps with rising learning rate."
    )
    heldout: Fraction = Field(
        0.1, description="Share of the align examples held out to choose a step."
    )
    select_by: Literal["fidelity", "objective", "last"] = Field(
        "fidelity",
        description="Keep the step (the start included) with the best held-out agreement of "
        "example gradients, the lowest held-out objective, or the last step.",
    )
    evaluate_every: int = Field(
        0, ge=0, description="Steps between held-out evaluations; 0: once an epoch."
    )
    rebalance: bool = Field(True, description="Return to the balanced gauge after each epoch.")
    seed: int = Field(0, description="Seed of the order of examples and of the held-out share.")

    @property
    def trains(self) -> bool:
        """Whether the factors are trained at all."""
        return self.epochs > 0 or self.recover_epochs > 0


class InfluenceSection(Section):
    """How gradients become scores."""

    loss_reduction: Literal["token_mean", "token_sum"] = Field(
        "token_mean", description="Loss of an example: mean or sum over its supervised tokens."
    )
    val_agg: Literal["mean_raw", "mean_unit", "subtask_max"] = Field(
        "mean_raw",
        description="Average query gradients as they are, as unit vectors, or inside each subtask "
        "with the maximum taken over subtasks.",
    )
    score: Literal["cosine", "dot", "half"] = Field(
        "cosine",
        description="Cosine of direction and gradient, or the plain dot product; half (kfac, "
        "ekfac): the cosine of both gradients times the inverse square root of the curvature, "
        "which takes a third product of every layer's rows.",
    )
    estimator: EstimatorName = Field(
        "tracin",
        description="What is done to the query gradient before scoring; tracin: nothing; graddot: "
        "nothing either, and scores are dot products whatever score says. kfac, ekfac and "
        "datainf multiply it by an inverse curvature of the scoring model, as influence "
        "functions do; multistage takes it at a model that was fine-tuned afterwards, and by "
        "that model's curvature first.",
    )
    query_rank: int = Field(
        0,
        ge=0,
        description="Score against query gradients cut to this rank in every layer, which is "
        "faster and takes less memory; the share of their norm that is lost is stored beside the "
        "scores. 0: exact.",
    )
    query_dtype: Literal["float32", "bfloat16"] = Field(
        "float32",
        description="Precision in which query gradients are held while examples are scored: "
        "bfloat16 takes half the room; what rounding loses is stored beside the scores.",
    )
    query_home: Literal["memory", "disk"] = Field(
        "memory",
        description="Where whole query gradients are while examples are scored: in memory, or in "
        "a temporary file of which one layer at a time is read, which takes next to no memory, "
        "however many tasks there are, and more time. Scores are the same bits.",
    )
    checkpoints: Literal["last", "epochs"] = Field(
        "last",
        description="Measure influence at the end of the warm-up, or at the end of each of its "
        "epochs, summed by their learning rates, as TracIn and LESS do; every checkpoint has a "
        "proxy and a scoring pass of its own.",
    )
    on_nonfinite: Literal["error", "skip"] = Field(
        "error",
        description="An example whose loss or gradient is not finite stops the job, or is left "
        "out of the ranking, counted and listed.",
    )

    @model_validator(mode="after")
    def _half_of_a_curvature(self) -> InfluenceSection:
        if self.score == "half" and self.estimator not in ("kfac", "ekfac"):
            raise ValueError("score half needs estimator kfac or ekfac: there is no curvature else")
        return self

    @model_validator(mode="before")
    @classmethod
    def _graddot_is_a_dot_product(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("estimator") == "graddot":
            return {**values, "score": "dot"}
        return values


class CurvatureSection(Section):
    """Curvature of the scoring model, for estimators that use it."""

    labels: Literal["empirical", "sampled"] = Field(
        "empirical",
        description="kfac, ekfac: gradients of the examples' own tokens, or of tokens drawn from "
        "the model at every supervised position (the true Fisher matrix).",
    )
    damping_mode: Literal["relative", "absolute", "factored"] = Field(
        "relative",
        description="Damping as a share of each layer's mean eigenvalue, as a number, or "
        "(kfac) such a share split over both factors.",
    )
    damping: float = Field(
        0.1,
        ge=0,
        description="Added to the curvature's eigenvalues before they are inverted; a sweep fits "
        "nothing again.",
    )
    max_factor_dim: int = Field(
        8192,
        ge=1,
        description="kfac, ekfac: longer inputs or outputs are split into blocks, correlations "
        "between which are dropped.",
    )
    proximity: Literal["auto"] | Annotated[float, Field(gt=0)] = Field(
        "auto",
        description="multistage: how strongly fine-tuning held the weights to those it began "
        "with; auto: one over the sum of its learning rates.",
    )
    seed: int = Field(0, description="Seed of sampled labels.")


class PrefilterSection(Section):
    """A cheap scorer that leaves most of the pool out of scoring by gradients.

    Read by runs that score by gradients. What it leaves out has no score and no rank.
    """

    by: Literal["none", "tfidf", "bm25", "dsir", "repsim", "embedding"] = Field(
        "none",
        description="Score all of the pool; or the examples that a scorer of this name ranks "
        "first, with the keys of the section scorer (embedding: cosine of the published text "
        "encoder of the section encoder).",
    )
    keep: Fraction = Field(
        0.2, description="Share of the pool kept for each task; all tasks score what one keeps."
    )


class FinetunedSection(Section):
    """What the target was fine-tuned on after the pool, for the estimator multistage.

    The pool is then the text of an earlier stage of training, scored at the target, and tasks
    are measured at the fine-tuned model (arXiv:2505.05017).
    """

    pool: PoolSection | None = Field(None, description="Examples of the fine-tuning.")
    model: str | None = Field(
        None,
        description="The fine-tuned model, named as target.model is: a causal LM, or a classifier "
        "of texts, whose pool and tasks then have labels as responses. Absent: the study "
        "fine-tunes the warmed-up target itself.",
    )
    revision: str | None = Field(None, description="Hub commit or tag of model.")
    examples: Size = Field(1.0, description="Examples of this pool that are trained on.")
    epochs: float = Field(1.0, gt=0, description="Passes over them.")
    lr: float = Field(1e-5, gt=0, description="Peak learning rate of AdamW.")
    batch: int = Field(32, gt=0, description="Sequences per optimizer step.")
    fisher: Size = Field(
        1024, description="Examples the fine-tuned model's curvature is fitted on."
    )
    seed: int = Field(0, description="Seed of the order of examples, and of both draws.")


class FeaturesSection(Section):
    """What is kept of every pool example's gradient."""

    kind: Literal["exact", "countsketch", "lora", "logra", "random"] = Field(
        "exact",
        description="Exact inner products with the tasks' gradients (nothing of the gradient is "
        "kept, a new task costs a pass), or a sketch of the gradient, which any later task is "
        "compared with: a count sketch, of the gradient or (faster) of a fresh LoRA's as "
        "Influcoder takes it, low-rank features of each layer (LoGRA), or a random projection.",
    )
    dim: int = Field(8192, ge=1, description="countsketch, lora, random: numbers per example.")
    rank: int = Field(
        16,
        ge=1,
        description="logra: rank on each side; rank * rank numbers per layer and example. "
        "lora: rank of the adapters.",
    )
    distribution: Literal["rademacher", "gaussian"] = Field(
        "rademacher", description="random: entries of the projection."
    )
    dtype: Literal["float16", "float32"] = Field(
        "float16", description="Precision sketches are stored in, at unit length."
    )
    check: int = Field(
        32,
        ge=0,
        description="Examples on which cosines of sketches are compared with exact ones; 0: none.",
    )
    seed: int = Field(0, description="Seed of the sketch and of the examples it is checked on.")


class ScorerSection(Section):
    """What ranks the pool."""

    kind: ScorerName = Field(
        "gradient",
        description="Gradient influence through the proxy; a text encoder that learns it from the "
        "teach split (influcoder), or a linear function of its embeddings that does (regression); "
        "Adam's directions in place of gradients (less); or random order, length of the response, "
        "similarity of words to the queries (TF-IDF, BM25), importance of n-grams (DSIR); or, of "
        "the warmed-up target, similarity of hidden states (RepSim), the response's perplexity, "
        "or how little its prompt helps it (IFD).",
    )
    prefer: Literal["high", "low", "middle"] = Field(
        "high", description="length, perplexity, ifd: which values rank first."
    )
    text: Literal["all", "prompt", "response"] = Field(
        "all", description="tfidf, bm25, dsir: part of candidates and queries that is compared."
    )
    over_queries: Literal["mean", "max"] = Field(
        "mean",
        description="tfidf, bm25, repsim: one score from the similarities to a task's queries.",
    )
    buckets: int = Field(
        10_000, ge=2, description="dsir: numbers that words and pairs of words are hashed into."
    )
    resample: bool = Field(
        True,
        description="dsir: rank by a draw in proportion to the weights, as its paper does; false: "
        "by the weights.",
    )
    pooling: Literal["last", "weighted"] = Field(
        "weighted",
        description="repsim: hidden state of the last token (RDS), or their mean, later tokens "
        "weighing more (RDS+).",
    )
    fit: Literal["ridge", "adam"] = Field(
        "ridge",
        description="regression: closed form, the penalty chosen by leaving one out; or, as "
        "published, a few passes of Adam, which hardly move the weights.",
    )
    draws: int = Field(
        1, ge=1, le=1000, description="random: number of independent draws, a run each."
    )
    seed: int = Field(0, description="random: seed of the first draw; dsir: of its draw.")


class EncoderSection(Section):
    """The text encoder of scorers that learn: which one, what it sees, and how it is taught."""

    model: str = Field(
        "minilm-l6",
        description="minilm-l6 (all-MiniLM-L6-v2, from a pinned package), a hub name, or a folder "
        "relative to data_dir, such as an encoder that an earlier study trained.",
    )
    revision: str | None = Field(None, description="Hub commit or tag.")
    train: bool = Field(
        True,
        description="influcoder: teach the encoder the teacher's scores; false: use it as it is, "
        "which needs no teacher.",
    )
    max_length: int = Field(
        256, ge=8, description="Tokens of a text that it sees; longer ones lose their beginning."
    )
    max_cut: float = Field(
        0.2, ge=0, le=1, description="Stop when a larger share of texts than this is cut."
    )
    instruction: str = Field(
        "Find examples that teach this: ", description="Put before a query's text."
    )
    queries: int = Field(8, ge=1, description="Queries of a training block.")
    candidates: int = Field(16, ge=2, description="Candidates of a training block.")
    hard_ratio: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="Share of a block's candidates taken from those its queries score highest.",
    )
    alpha: float = Field(
        0.5,
        ge=0,
        le=1,
        description="Weight of the correlation with the teacher's scores; the rest is that of the "
        "divergence of each query's distribution over candidates.",
    )
    temperature: float = Field(0.05, gt=0, description="Temperature of these distributions.")
    epochs: int = Field(
        8, gt=0, description="Passes over the labelled candidates and, at least, all queries."
    )
    lr: float = Field(5e-5, gt=0, description="Peak learning rate of AdamW.")
    weight_decay: float = Field(0.01, ge=0, description="Weight decay.")
    lr_warmup: float = Field(
        0.1, ge=0, lt=1, description="Share of steps with rising learning rate."
    )
    heldout: Fraction = Field(
        0.2, description="Share of each task's queries the encoder is judged on and never sees."
    )
    validation: Fraction = Field(
        0.1, description="Share of the labelled candidates kept to choose an epoch by."
    )
    select_by: Literal["validation", "last"] = Field(
        "validation",
        description="Keep the epoch that agrees best on the validation candidates "
        "(the untrained encoder included), or the last.",
    )
    seed: int = Field(0, description="Seed of blocks, of dropout and of what is held out.")


class FidelitySection(Section):
    """Comparison of a proxy's scores with the target's on the fidelity slice."""

    enabled: bool = Field(True, description="Measure fidelity of every proxy.")
    floor: float | None = Field(
        0.8,
        gt=-1,
        lt=1,
        description="sparsity auto: least mean Spearman with the target; null: take the largest "
        "proxy within proxy.max_cost.",
    )
    top: list[Fraction] = Field(
        default=[0.05, 0.1, 0.2],
        min_length=1,
        description="Shares at which top-k overlap is taken.",
    )
    bootstrap: int = Field(
        1000, ge=0, description="Resamples of the 95 % intervals; 0: no intervals."
    )
    seed: int = Field(0, description="Seed of the resamples.")


class SelectSection(Section):
    """Which examples of the ranking are kept, for each task or for all together."""

    fraction: Fraction = Field(0.05, description="Share of the pool selected.")
    count: int | None = Field(
        None, gt=0, description="Number of examples selected, in place of fraction."
    )
    tasks: Literal["each", "round_robin", "union"] = Field(
        "each",
        description="A selection for each task; or one for all: each takes its best example left "
        "in turn, or the best by calibrated scores are taken. One model is then trained.",
    )
    calibrate: Literal["rank", "zscore"] = Field(
        "rank", description="tasks union: scale on which scores of tasks are compared."
    )
    method: Literal["top", "threshold", "k_centre", "facility_location", "dpp"] = Field(
        "top",
        description="The best; the best that are not alike; or, among a shortlist of the best, "
        "greedy k-centre, facility location, or a determinantal process. All but top compare "
        "features: sketches of gradients (features.kind) or embeddings.",
    )
    max_similarity: float = Field(
        0.9, ge=-1, le=1, description="threshold: largest cosine to an example chosen before."
    )
    shortlist: float = Field(
        4.0,
        ge=1,
        description="k_centre, facility_location, dpp: examples chosen among, in multiples of "
        "those selected.",
    )
    quality_weight: float = Field(
        1.0,
        ge=0,
        description="facility_location, dpp: weight of an example's place in the shortlist (1 the "
        "best, 0 the last) against diversity.",
    )
    duplicates: Literal["keep", "text", "near"] = Field(
        "keep",
        description="Leave out examples whose words are those of a better one, or whose word "
        "5-grams overlap with one's.",
    )
    duplicate_overlap: Fraction = Field(
        0.8, description="duplicates near: Jaccard similarity from which they are duplicates."
    )
    quotas: dict[str, Annotated[float, Field(ge=0, le=1)]] = Field(
        default={},
        description="Largest share of the selection by category; '*' is every other one. With "
        "methods top and threshold.",
    )
    quota_by: Literal["category", "source"] = Field(
        "category", description="What quotas are shares of."
    )
    seed: int = Field(
        0, description="Seed of the parts that a large shortlist is cut into: 8192 examples each."
    )
    allow_contaminated: bool = Field(
        False,
        description="Go on when examples of a task also stand in the pool; listed either way.",
    )


class FinetuneSection(Section):
    """Fine-tuning of the target on a selection."""

    enabled: bool = Field(True, description="Fine-tune on each selection.")
    epochs: float = Field(4.0, gt=0, description="Passes over the selection.")
    lr: float = Field(1e-5, gt=0, description="Peak learning rate of AdamW.")
    weight_decay: float = Field(0.0, ge=0, description="Weight decay.")
    batch: int = Field(32, gt=0, description="Sequences per optimizer step.")
    lr_warmup: float = Field(
        0.03, ge=0, lt=1, description="Share of steps with rising learning rate."
    )
    init: Literal["base", "warmed"] = Field(
        "base", description="Start from the target or its warm-up."
    )
    freeze_embed_head: bool = Field(False, description="Keep token embedding and head fixed.")
    lora_rank: int = Field(
        0,
        ge=0,
        description="Train low-rank updates of the block linears (LoRA, through peft) and merge "
        "them in the end; 0: train all weights.",
    )
    lora_alpha: float = Field(
        16.0, gt=0, description="Scale of LoRA's updates, which is this over the rank."
    )
    seed: int = Field(0, description="Seed of the order of examples.")


class EvaluateSection(Section):
    """What is measured of the base and of every fine-tuned model."""

    enabled: bool = Field(True, description="Evaluate the base and every fine-tuned model.")
    accuracy: bool = Field(
        True, description="Measure choices and generated answers, not losses alone."
    )
    max_length: int = Field(
        2048,
        ge=8,
        description="Tokens of a prompt that is answered; longer ones lose worked examples. "
        "Losses keep to chat.max_length, as the queries do.",
    )
    bootstrap: int = Field(
        1000, ge=0, description="Resamples of the 95 % intervals; 0: no intervals."
    )
    seed: int = Field(0, description="Seed of the resamples.")


class ReportSection(Section):
    """What the report shows. Nothing here changes a result."""

    examples: int = Field(10, ge=1, le=100, description="Best and worst examples shown per task.")
    find: list[str] = Field(
        default=[],
        description="Categories of the pool that rankings are judged by how early they list, as "
        "when unsafe examples are to be filtered out.",
    )


class SyntheticSection(Section):
    """The experiment on made-up data (``snakemake f3``). No part of a study file."""

    seeds: int = Field(3, ge=1, description="Random tasks and networks.")
    sparsities: list[Annotated[float, Field(gt=0, lt=1)]] = Field(
        default=[0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9],
        min_length=1,
        description="Share of each layer's parameters removed.",
    )


class SmallModelSection(Section):
    """Sizes of a model that is small enough to be retrained hundreds of times."""

    vocabulary: int = Field(1024, ge=260, description="Tokens of its byte-level BPE tokenizer.")
    width: int = Field(64, ge=8, description="Width of its residual stream.")
    blocks: int = Field(2, ge=1, description="Its decoder blocks.")
    heads: int = Field(4, ge=1, description="Attention heads of a block.")
    max_length: int = Field(96, ge=8, description="Tokens per example; longer ones are cut.")
    pretrain_epochs: float = Field(20.0, gt=0, description="Passes of its first training.")
    pretrain_lr: float = Field(3e-3, gt=0, description="Peak learning rate of AdamW there.")
    epochs: float = Field(5.0, gt=0, description="Passes of its second training.")
    lr: float = Field(1e-3, gt=0, description="Peak learning rate of AdamW there.")
    batch: int = Field(16, gt=0, description="Sequences per step, in both.")
    seeds: int = Field(3, ge=1, description="Draws of examples, weights and subsets.")
    bootstrap: int = Field(
        1000, ge=0, description="Resamples of the 95 % intervals; 0: no intervals."
    )

    def trainings(self, seed: int) -> tuple[WarmupSection, FinetuneSection]:
        """Settings of both trainings; the first trains all weights, the second the blocks."""
        first = WarmupSection(
            epochs=self.pretrain_epochs,
            lr=self.pretrain_lr,
            batch=self.batch,
            freeze_embed_head=False,
            seed=seed,
        )
        second = FinetuneSection(
            epochs=self.epochs, lr=self.lr, batch=self.batch, freeze_embed_head=True, seed=seed
        )
        return first, second


class FaithfulnessSection(SmallModelSection):
    """Ground truth for the runs of a study, on a tiny model (``snakemake faithfulness``).

    The model is trained on part of the pool first, and then on candidates: on all of them, for
    each run's way of scoring, and again and again on random halves. The linear datamodeling
    score is the rank correlation of what the scores of a subset add up to and what training on
    it did to the loss of each query.
    """

    candidates: int = Field(128, ge=4, description="Pool examples scored and retrained on.")
    queries: int = Field(24, ge=1, description="Pool examples whose loss is explained.")
    subsets: int = Field(64, ge=3, description="Random subsets retrained on, for every seed.")
    fraction: float = Field(0.5, gt=0, lt=1, description="Share of the candidates in a subset.")


class FactsSection(SmallModelSection):
    """Tracing answers to pre-training text (``snakemake m1 m2``). No part of a study file."""

    vocabulary: int = Field(400, ge=260, description="Tokens of its byte-level BPE tokenizer.")
    pretrain_epochs: float = Field(40.0, gt=0, description="Passes over the corpus.")
    epochs: float = Field(10.0, gt=0, description="Passes over the questions.")
    lr: float = Field(5e-4, gt=0, description="Peak learning rate of AdamW there.")
    people: int = Field(16, ge=2, le=26, description="People with three facts each.")
    left_out: int = Field(
        4, ge=2, description="Random halves of the queries' facts left out of both trainings."
    )
    damping: float = Field(0.1, gt=0, description="Damping, relative to the mean eigenvalue.")


class RunConfig(Section):
    """One way of scoring the pool, resolved: every section a run may override."""

    preset: Literal["default", "paper", "reference"] = Field(
        "default",
        description="Starting values: this project's choices, the paper's text, or its code.",
    )
    until: Literal["fidelity", "ranking", "selection", "evaluation"] = Field(
        "evaluation", description="Last stage this run goes to."
    )
    chat: ChatSection = ChatSection()
    split: SplitSection = SplitSection()
    warmup: WarmupSection = WarmupSection()
    probe: ProbeSection = ProbeSection()
    proxy: ProxySection = ProxySection()
    align: AlignSection = AlignSection()
    influence: InfluenceSection = InfluenceSection()
    curvature: CurvatureSection = CurvatureSection()
    prefilter: PrefilterSection = PrefilterSection()
    features: FeaturesSection = FeaturesSection()
    scorer: ScorerSection = ScorerSection()
    encoder: EncoderSection = EncoderSection()
    fidelity: FidelitySection = FidelitySection()
    select: SelectSection = SelectSection()
    finetune: FinetuneSection = FinetuneSection()
    evaluate: EvaluateSection = EvaluateSection()

    def settled(self) -> RunConfig:
        """The same with ``proxy.whiten`` chosen, which depends on other sections."""
        if self.proxy.whiten != "auto":
            return self
        for_queries = self.proxy.passes == "backward" and self.features.kind == "exact"
        chosen = {"whiten": "queries" if for_queries else "both"}
        return self.model_copy(update={"proxy": self.proxy.model_copy(update=chosen)})


class StudyConfig(RunConfig):
    """A study file: the defaults of all runs, and the runs."""

    study: Name = Field(description="The study's name: results land in results/studies/<study>.")
    data_dir: str | None = Field(
        None,
        description="Folder that paths are relative to; the folder Snakemake runs in if absent.",
    )
    target: TargetSection = TargetSection()
    pool: PoolSection = Field(description="The candidate pool.")
    tasks: list[TaskSection] = Field(min_length=1, description="The tasks, by name or as mappings.")
    shards: int = Field(
        1, gt=0, le=100_000, description="Scoring jobs the pool is cut into. Changes no result."
    )
    train_gpus: int = Field(
        1,
        gt=0,
        description="GPUs of one machine that a warm-up or fine-tuning is spread over, for models "
        "that do not fit on one (FSDP); batches are multiples of it. Changes results by rounding.",
    )
    report: ReportSection = ReportSection()
    finetuned: FinetunedSection = FinetunedSection()
    faithfulness: FaithfulnessSection = FaithfulnessSection()
    runs: dict[Name, dict[str, Any]] = Field(
        min_length=1,
        description="Named overrides of the sections above; a list of values is a grid.",
    )
