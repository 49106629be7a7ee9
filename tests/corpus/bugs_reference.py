"""Bugs of the reference: shared with the policy, trained, of another size, or another run's."""

from __future__ import annotations

from foreign import plain

from corpus.case import case, in_loop
from rlhf_doctor.setups import RLHFSetup


@case("TRL-050", "the reference", roles="reference policy setup")
def one_object(healthy: RLHFSetup) -> RLHFSetup:
    """The policy is given as its own reference."""
    return healthy.but(reference=healthy.policy)


@case("TRL-050", "plain modules", roles="reference policy setup")
def one_plain_object() -> dict[str, object]:
    """The reference of a plain PyTorch setup is the actor itself."""
    fields = plain.healthy()
    return {**fields, "reference": fields["policy"]}


in_loop("VRL-104", "joined_v_head", "kl_in_reward_and_loss")
