"""The `features` setting of distillation losses."""

from __future__ import annotations

from penjing.errors import RecipeError


def paired(term: object, field: str = "features", least: int = 1) -> tuple[tuple[str, str], ...]:
    """Normalize a setting's features to pairs of (student's, teacher's) names; a single name stands for itself in both.

    Raises:
        RecipeError: They are not names, or there are too few.
    """
    features, pairs = getattr(term, field), []
    for feature in features if isinstance(features, tuple | list) else [None]:
        pair = (feature, feature) if isinstance(feature, str) else feature
        if not (isinstance(pair, tuple | list) and len(pair) == 2 and all(isinstance(name, str) for name in pair)):
            raise RecipeError(
                f"{type(term).__name__}({field}=...) can't be used",
                code="settings",
                field=field,
                got=repr(features),
                expected="names, or pairs of names",
                remedy=f'for example {field}=("stages.1", "stages.2"), or (("stages.1", "layer2"),)',
            )
        pairs.append((pair[0], pair[1]))
    if len(pairs) < least:
        raise RecipeError(
            f"{type(term).__name__} needs features to compare",
            code="no-features",
            field=field,
            got="none",
            expected="at least one name",
        )
    return tuple(pairs)
