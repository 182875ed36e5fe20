"""Built-in lightweight networks, built by name; one family per file."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from typing import Any

from torch import nn

from penjing.architectures import (
    bert,
    densenet,
    efficientnet,
    ghostnet,
    gpt,
    inception,
    lstm_tagger,
    mnasnet,
    mobilenet_v1,
    mobilenet_v2,
    mobilenet_v3,
    resnet,
    resnext,
    shufflenet_v2,
    squeezenet,
    unet,
    vgg,
    vit,
)
from penjing.errors import SourceError

_BUILDERS: dict[str, Callable[..., nn.Module]] = {
    "bert_base": bert.bert_base,
    "bert_small": bert.bert_small,
    "bert_tiny": bert.bert_tiny,
    "densenet121": densenet.densenet121,
    "densenet169": densenet.densenet169,
    "densenet201": densenet.densenet201,
    "efficientnet_b0": efficientnet.efficientnet_b0,
    "efficientnet_b1": efficientnet.efficientnet_b1,
    "efficientnet_b2": efficientnet.efficientnet_b2,
    "efficientnet_b3": efficientnet.efficientnet_b3,
    "efficientnet_b4": efficientnet.efficientnet_b4,
    "efficientnet_lite0": efficientnet.efficientnet_lite0,
    "efficientnet_lite1": efficientnet.efficientnet_lite1,
    "efficientnet_lite2": efficientnet.efficientnet_lite2,
    "efficientnet_lite3": efficientnet.efficientnet_lite3,
    "efficientnet_lite4": efficientnet.efficientnet_lite4,
    "ghostnet": ghostnet.ghostnet,
    "gpt2": gpt.gpt2,
    "gpt_tiny": gpt.gpt_tiny,
    "googlenet": inception.googlenet,
    "inception_v3": inception.inception_v3,
    "lstm_tagger": lstm_tagger.lstm_tagger,
    "mnasnet0_5": mnasnet.mnasnet0_5,
    "mnasnet1_0": mnasnet.mnasnet1_0,
    "mobilenet_v1": mobilenet_v1.mobilenet_v1,
    "mobilenet_v2": mobilenet_v2.mobilenet_v2,
    "mobilenet_v3_large": mobilenet_v3.mobilenet_v3_large,
    "mobilenet_v3_small": mobilenet_v3.mobilenet_v3_small,
    "resnet8": resnet.resnet8,
    "resnet18": resnet.resnet18,
    "resnet20": resnet.resnet20,
    "resnet32": resnet.resnet32,
    "resnet50": resnet.resnet50,
    "resnet56": resnet.resnet56,
    "resnext50_32x4d": resnext.resnext50_32x4d,
    "resnext101_32x8d": resnext.resnext101_32x8d,
    "shufflenet_v2_x0_5": shufflenet_v2.shufflenet_v2_x0_5,
    "shufflenet_v2_x1_0": shufflenet_v2.shufflenet_v2_x1_0,
    "shufflenet_v2_x1_5": shufflenet_v2.shufflenet_v2_x1_5,
    "shufflenet_v2_x2_0": shufflenet_v2.shufflenet_v2_x2_0,
    "squeezenet1_0": squeezenet.squeezenet1_0,
    "squeezenet1_1": squeezenet.squeezenet1_1,
    "unet": unet.unet,
    "vgg11": vgg.vgg11,
    "vgg13": vgg.vgg13,
    "vgg16": vgg.vgg16,
    "vgg16_small": vgg.vgg16_small,
    "vgg19": vgg.vgg19,
    "vit_base": vit.vit_base,
    "vit_small": vit.vit_small,
    "vit_tiny": vit.vit_tiny,
}


def names() -> tuple[str, ...]:
    """Return all names that `build` accepts, sorted.

    >>> "resnet20" in names()
    True
    """
    return tuple(sorted(_BUILDERS))


def build(name: str, **settings: Any) -> nn.Module:
    """Build a network with random weights from torch's global generator.

    Args:
        name: One of `names()`.
        settings: Arguments of the family's factory, for example ``in_channels=1, classes=10``.

    Raises:
        SourceError: The name is unknown, or the family does not accept a setting.

    >>> build("resnet20", in_channels=1).classifier.out_features
    10
    """
    builder = _BUILDERS.get(name)
    if builder is None:
        near = difflib.get_close_matches(name, names(), n=3, cutoff=0.5) or names()
        raise SourceError(
            "There is no built-in architecture of that name.",
            code="unknown-architecture",
            got=repr(name),
            expected="one of " + ", ".join(names()),
            remedy="Did you mean " + " or ".join(near) + "?",
        )
    try:
        return builder(**settings)
    except (TypeError, ValueError) as error:
        raise SourceError(
            f"The architecture {name} can't be built with these settings.",
            code="settings",
            got=f"{settings} ({error})",
            expected="settings that its factory takes, with positive whole numbers",
            remedy=f"See help({builder.__module__}.{name}).",
        ) from error


__all__ = ["build", "names"]
