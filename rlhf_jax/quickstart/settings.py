"""Every number of a quickstart run, in two sizes: the real one and `tiny`."""

import dataclasses

__all__ = ["Settings", "full", "tiny"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """What a run does. Together with the packages' versions it determines the run's numbers."""

    seed: int = 0
    devices: int = 2  # the batch is split over these; the host's cores when there is no accelerator

    # Texts and shapes (tokens).
    train_texts: int  # rated texts that the language model and its reward model may see
    judge_texts: int  # rated texts for the judge alone
    text_length: int  # a rated text is cut after this many tokens
    prompt_length: int  # P, slots for the prefix that is to be continued
    response_length: int  # R, tokens of the continuation

    # The shared trunk: layers below `trunk` stay as they are once the base model exists.
    trunk: int  # actor, critic, reference and reward model read the activations entering this layer
    judge_layer: int  # the judge reads another layer, so that it does not share the reward model's view

    # 1. Base model: supervised fine-tuning from layer `base_from` on (0 trains everything).
    base_from: int
    base_steps: int
    base_batch: int
    base_rate: float

    # 2. Reward model and judge.
    comparisons: int  # pairs from single human ratings, for each of the two
    reward_steps: int = 300
    reward_rate: float = 3e-3
    reward_decay: float = 1.0  # weight decay

    # 3. AC-HF.
    turns: int
    batch: int  # continuations per turn
    minibatches: int  # gradient steps per turn
    actor_rate: float
    critic_rate: float = 1e-3
    kl_coefficient: float
    kl_target: float = 6.0  # nats per continuation
    kl_horizon: float = 10_000.0  # continuations over which the coefficient is steered there

    # 4. PD.
    student_layers: tuple[int, ...]  # the base model's layers that the student is made of
    student_from: int  # it trains its own layers from this one on
    teacher_samples: int
    start_steps: int  # plain distillation that both students share
    student_steps: int  # then each goes its own way
    student_batch: int
    student_rate: float
    human_beta: float  # strength of the pull to the teacher, in standard deviations of the reward

    # 5. Judging.
    eval_prompts: int = 256

    def __post_init__(self) -> None:
        if self.student_layers[: self.student_from] != tuple(range(self.student_from)):
            raise ValueError(
                f"the student's frozen layers must be the base model's first {self.student_from}, because their "
                f"activations are shared; got {self.student_layers}"
            )


def full(seed: int = 0, devices: int = 2) -> Settings:
    """SmolLM2-135M on tweets and product reviews, in a few minutes on two cores."""
    return Settings(
        seed=seed,
        devices=devices,
        train_texts=1600,
        judge_texts=1200,
        text_length=32,
        prompt_length=8,
        response_length=16,
        trunk=20,
        judge_layer=15,
        base_from=20,
        base_steps=10,
        base_batch=32,
        base_rate=5e-5,
        comparisons=16_384,
        turns=14,
        batch=64,
        minibatches=4,
        actor_rate=3e-4,
        kl_coefficient=0.16,
        student_layers=(*range(12), *range(22, 30)),  # of all runs of ten layers, these ten are missed least
        student_from=12,
        teacher_samples=768,
        start_steps=16,
        student_steps=48,
        student_batch=16,
        student_rate=4e-4,
        human_beta=0.1,
    )


def tiny(seed: int = 0, devices: int = 2) -> Settings:
    """A byte-level model on rated words, in less than a minute and without a download."""
    return Settings(
        seed=seed,
        devices=devices,
        train_texts=3000,
        judge_texts=3000,
        text_length=12,
        prompt_length=4,
        response_length=10,
        trunk=2,
        judge_layer=1,
        base_from=0,
        base_steps=150,
        base_batch=128,
        base_rate=3e-3,
        comparisons=8192,
        turns=20,
        batch=64,
        minibatches=4,
        actor_rate=1e-3,
        kl_coefficient=0.1,
        student_layers=(0, 1, 3),
        student_from=0,
        teacher_samples=512,
        start_steps=40,
        student_steps=40,
        student_batch=64,
        student_rate=2e-3,
        human_beta=0.3,
        eval_prompts=128,
    )
