"""What coupling has to say of the weights of a network."""

_INPUTS = ("its inputs", "the inputs of its gates", "the state that its gates read")


def assert_every_weight_is_listed(network, coupling):
    """By its outputs a weight of more than one row is in a group or not prunable; in both, if some rows can go."""
    members = {}
    for group in coupling.groups.values():
        for m in group.members:
            if m.role not in _INPUTS:
                members.setdefault(m.tensor, []).append(m)
    held = {where.rpartition(":")[0] for where in coupling.not_prunable}
    weights = {name: weight for name, weight in network.named_parameters() if weight.dim() > 1 and len(weight) > 1}
    assert weights
    for name, weight in weights.items():
        assert name in members or name in held, name
        if name in members and name in held:
            assert any(len(m.positions) < weight.shape[m.axis] for m in members[name]), name
