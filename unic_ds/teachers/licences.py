"""Licences of weights: their terms, from an SPDX id, an id of the hub or a licence's title.

Stdlib only. A licence permits only what its text says, so no unknown text is permissive; words that
restrict (`non-commercial`, `research`) count in any text.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Literal, NamedTuple

Terms = Literal["permissive", "custom", "non-commercial", "research only", "unknown"]
STRICTNESS: tuple[Terms, ...] = (
    "permissive",
    "custom",
    "non-commercial",
    "research only",
    "unknown",
)
"""From the mildest: an unknown licence permits nothing."""


class Licence(NamedTuple):
    """A licence by its id."""

    id: str
    """As the Hugging Face hub or SPDX writes it, in lower case; empty for one that is not known."""
    terms: Terms
    link: str = ""
    """Address of its text, for one that the hub has no id for."""


META = "https://ai.meta.com/resources/models-and-libraries"
NVIDIA = "https://www.nvidia.com/en-us/agreements/enterprise-software/nvidia-open-model-license/"
PERMISSIVE = (
    "apache-2.0 mit bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear isc zlib ncsa unlicense wtfpl"
    " cc0-1.0 cc-by-2.0 cc-by-2.5 cc-by-3.0 cc-by-4.0 postgresql bsl-1.0 ms-pl afl-3.0"
    " cdla-permissive-1.0 cdla-permissive-2.0 pddl odc-by openmdw-1.0 openmdw-1.1"
)
CUSTOM = (
    "openrail openrail++ creativeml-openrail-m bigscience-openrail-m bigscience-bloom-rail-1.0"
    " bigcode-openrail-m gemma llama2 llama3 llama3.1 llama3.2 llama3.3 llama4 apple-ascl gpl"
    " gpl-2.0 gpl-3.0 agpl-3.0 lgpl lgpl-2.1 lgpl-3.0 mpl-2.0 epl-1.0 epl-2.0 eupl-1.1 eupl-1.2"
    " osl-3.0 artistic-2.0 cc-by-sa-3.0 cc-by-sa-4.0 cc-by-nd-4.0 gfdl odbl cdla-sharing-1.0"
)
NON_COMMERCIAL = " ".join(
    f"cc-by-nc{more}-{version}" for more in ("", "-sa", "-nd") for version in ("2.0", "3.0", "4.0")
)
RESEARCH_ONLY = "apple-amlr fair-noncommercial-research-license intel-research h-research"
GROUPS: tuple[tuple[str, Terms], ...] = (
    (PERMISSIVE, "permissive"),
    (CUSTOM, "custom"),
    (NON_COMMERCIAL, "non-commercial"),
    (RESEARCH_ONLY, "research only"),
)
ON_HUB = {name: terms for names, terms in GROUPS for name in names.split()}
"""Ids that the hub accepts as `license`."""
ELSEWHERE: dict[str, tuple[Terms, str]] = {
    "dinov3-license": ("custom", f"{META}/dinov3-license/"),
    "sapiens2-license": ("custom", ""),
    "cvnets-license": ("custom", "https://github.com/apple/ml-cvnets/blob/main/LICENSE"),
    "fastvit-license": ("custom", "https://github.com/apple/ml-fastvit/blob/main/LICENSE"),
    "mobileone-license": ("custom", "https://github.com/apple/ml-mobileone/blob/main/LICENSE"),
    "nvidia-open-model-license": ("custom", NVIDIA),
    "qwen-community-1.0": ("custom", ""),
    "nsclv1": ("non-commercial", "https://github.com/NVlabs/RADIO/blob/main/LICENSE"),
    "seer-license": ("research only", ""),
}
"""Licences that the hub calls `other`: terms, and address of the text if known."""
TITLES = {
    "apache-2": "apache-2.0",
    "apache": "apache-2.0",
    "mit-0": "mit",
    "expat": "mit",
    "new-bsd": "bsd-3-clause",
    "simplified-bsd": "bsd-2-clause",
    "cc0": "cc0-1.0",
    "nvidia-open-model": "nvidia-open-model-license",
    "nvidia-source-code-v1": "nsclv1",
    "nvidia-source-code-nc": "nsclv1",
    "nvidia-source-code": "nsclv1",
    "apple-machine-learning-research-model": "apple-amlr",
    "apple-sample-code": "apple-ascl",
    "fair-noncommercial-research": "fair-noncommercial-research-license",
    "fair-noncommercial": "fair-noncommercial-research-license",
    "fair-nc": "fair-noncommercial-research-license",
}
"""Other ways to write a licence, as `slug` leaves them."""
RESTRICTIONS: tuple[tuple[str, Terms], ...] = (
    (r"\bresearch\b", "research only"),
    (r"non-?commercial|\bnc\b|not-for-commercial|no-commercial", "non-commercial"),
    (r"\b(dinov3|llama|gemma|openrail|rail|qwen|sapiens|nvidia|apple|meta)\b", "custom"),
    (r"\b(a?gpl|lgpl|sharealike|share-alike|copyleft)", "custom"),
)
"""Words of a licence whose text as a whole is not known, the strictest first."""


def identify(text: object) -> Licence:
    """The licence that a text names; its id is empty if the text as a whole is not known."""
    plain = slug(text)
    ids = {re.sub(r"-licen[cs]e\b", "", name): name for name in (*ON_HUB, *ELSEWHERE)}
    name = ids.get(plain) or ids.get(TITLES.get(plain, "").removesuffix("-license"), "")
    if name in ON_HUB:
        return Licence(name, ON_HUB[name])
    if name in ELSEWHERE:
        return Licence(name, *ELSEWHERE[name])
    terms = (terms for words, terms in RESTRICTIONS if re.search(words, plain))
    return Licence("", next(terms, "unknown"))


def parts(text: object) -> list[str]:
    """The licences that a text joins by AND, as SPDX writes it: each of them binds."""
    return str(text or "").split(" AND ")


def licence_class(text: object) -> Terms:
    """The terms of the licence that a text names, `unknown` for one that is not known.

    Of several that AND joins, the strictest.
    """
    return strictest(identify(part).terms for part in parts(text))


def strictest(found: Iterable[Terms]) -> Terms:
    """The strictest of several terms, `unknown` if there are none."""
    return max(found, key=STRICTNESS.index, default="unknown")


def slug(text: object) -> str:
    """A licence's name in lower case, with hyphens, and without words that say nothing."""
    lower = str(text or "").strip().lower()
    lower = re.sub(r"attribution-?(?=non|share|no)", "cc-by-", lower)
    lower = re.sub(r"\b(the|licen[cs]ed?|version|international|agreement|v(?=\d))\b", " ", lower)
    lower = re.sub(r"\bv(?=\d+(\.\d+)*$)", "", lower)
    return re.sub(r"[\s_,()-]+", "-", lower).strip("-.")
