"""The objective in force as text: what `phi4r rl RECIPE --explain` and reports print."""

from __future__ import annotations

from phi4r.configs.sections import SURROGATE_SETTINGS, ObjectiveConfig
from phi4r.objectives.objective import surrogate_of
from phi4r.objectives.surrogates import bounds


def formula(settings: ObjectiveConfig) -> str:
    """The loss with the numbers of `settings` as text, one definition a line, terms that are off left out:
    for `--explain` and reports."""
    terms = "-s_t"
    lines = [
        "r_t = pi(o_t) / pi_old(o_t)"
        if settings.ratio == "token"
        else "r_t = exp(mean over the response of log pi(o) - log pi_old(o))",
        _surrogate_formula(settings),
    ]
    if settings.dual_clip:
        lines.append(f"s_t = max(s_t, {settings.dual_clip:g} A_t) where A_t < 0")
    if settings.importance_cap:
        terms = "-i_t s_t"
        lines.append(_importance_formula(settings))
    if settings.off_policy_limit:
        lines.append(
            f"s_t = 0 where A_t < 0 and the mean over the response of log pi_rollout(o) - log pi(o) is above"
            f" {settings.off_policy_limit:g}"
        )
    if settings.top_entropy < 1:
        lines.append(
            f"s_t = 0 and H_t = 0 but for the {settings.top_entropy:g} of the tokens with the largest H_t"
        )
    if settings.kl_coef:
        estimate = {"k1": "d_t", "k2": "d_t^2 / 2", "k3": "exp(-d_t) - 1 + d_t"}[settings.kl_estimator]
        if settings.kl_ratio:
            estimate = f"r_t ({estimate})"
        pi = "pi_old" if settings.kl_in_reward else "pi"
        lines.append(f"KL_t = {estimate},  d_t = log {pi}(o_t) - log pi_{settings.kl_reference}(o_t)")
        if settings.kl_in_reward:
            lines.append(f"R_i = R_i - {settings.kl_coef:g} sum_t KL_t, before the advantages")
        else:
            terms += f" + {settings.kl_coef:g} KL_t"
    total = {
        "token": "loss = sum_i sum_t l_t / sum_i |o_i|",
        "sequence": "loss = 1/n sum_i 1/|o_i| sum_t l_t",
        "constant": f"loss = 1/n sum_i 1/{settings.constant or 'L_max'} sum_t l_t",
    }[settings.normalization]
    if settings.entropy_coef:
        lines.append("H_t = entropy of pi at token t")
        if settings.entropy_mean == "token":
            total += f" - {settings.entropy_coef:g} sum_i sum_t H_t / sum_i |o_i|"
        else:
            terms += f" - {settings.entropy_coef:g} H_t"
    if settings.drop_truncated:
        total += ",  without truncated answers"
    return "\n".join([*lines, f"l_t = {terms}", total])


def _surrogate_formula(settings: ObjectiveConfig) -> str:
    """The first paragraph of the surrogate's docstring with its numbers."""
    surrogate = surrogate_of(settings)
    text = " ".join((surrogate.__doc__ or "").strip().split("\n\n")[0].split("\n"))
    if settings.surrogate not in SURROGATE_SETTINGS:
        return f"s_t = {settings.surrogate}: {text}" if text else f"s_t = {settings.surrogate}"
    low, high = bounds(settings)
    return text.format(low=low, high=high, objective=settings)


def _importance_formula(settings: ObjectiveConfig) -> str:
    ratio = {
        "token": "pi_old(o_t) / pi_rollout(o_t)",
        "sequence": "pi_old(o) / pi_rollout(o) of the response",
        "mean": "exp(mean over the response of log pi_old(o) - log pi_rollout(o))",
    }[settings.importance_level]
    floor, cap = settings.importance_floor, settings.importance_cap
    if settings.importance_mode == "mask":
        return f"i_t = {ratio}, 0 outside [{floor:g}, {cap:g}]"
    return f"i_t = clip({ratio}, {floor:g}, {cap:g})" if floor else f"i_t = min({ratio}, {cap:g})"
