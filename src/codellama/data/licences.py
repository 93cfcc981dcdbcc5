"""Licences: what a package or file declares, as one SPDX-like string, and if it is permissive.

It reads what a package declares and nothing more: it is no legal advice, and it does not look
for licences of single files apart from `SPDX-License-Identifier` lines and GNU headers.

In: METADATA of a wheel, text of a licence file, first lines of a source file. Out: strings such
as `MIT`, `Apache-2.0 OR BSD-3-Clause`, `BSD` (which clause is not known), `unknown`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from email.message import Message

UNKNOWN = "unknown"

PERMISSIVE = frozenset(
    {"0BSD", "AFL-3.0", "Apache-2.0", "BlueOak-1.0.0", "BSD", "BSD-1-Clause", "BSD-2-Clause"}
    | {"BSD-3-Clause", "BSL-1.0", "CC0-1.0", "CNRI-Python", "HPND", "ISC", "MIT", "MIT-0"}
    | {"MIT-CMU", "NCSA", "PSF-2.0", "Python-2.0", "Unicode-3.0", "Unlicense", "UPL-1.0", "WTFPL"}
    | {"Zlib", "ZPL-2.1", "LicenseRef-Biopython-License-Agreement", "LicenseRef-Public-Domain"}
)

# SPDX <- free-text names in use, compared in lower case without punctuation and filler words.
_NAMES_OF = {
    "MIT": "mit, expat",
    "MIT-CMU": "mit cmu",
    "HPND": "hpnd, historical permission notice and disclaimer hpnd",
    "Apache-2.0": "apache, apache 2, apache 2.0, apache2, apache software, apache software 2.0, "
    "asl 2, asl 2.0",
    "BSD": "bsd",
    "BSD-2-Clause": "bsd 2 clause, 2 clause bsd, simplified bsd",
    "BSD-3-Clause": "bsd 3 clause, 3 clause bsd, new bsd, modified bsd",
    "ISC": "isc, isc iscl",
    "PSF-2.0": "psf, psf 2.0, psfl, python software foundation, python 2.0",
    "Unlicense": "unlicense, unlicense unlicense",
    "LicenseRef-Public-Domain": "public domain",
    "Zlib": "zlib, zlib libpng",
    "ZPL-2.1": "zope public, zpl 2.1",
    "CC0-1.0": "cc0, cc0 1.0 universal cc0 1.0 public domain dedication",
    "BSL-1.0": "boost software 1.0 bsl 1.0",
    "MIT-0": "mit no attribution mit 0",
    "MPL-2.0": "mozilla public 2.0 mpl 2.0, mpl 2.0",
}
_NAMES = {name: spdx for spdx, names in _NAMES_OF.items() for name in names.split(", ")}

# Classifiers that name a property and no licence.
_NO_LICENCE = {"freely distributable", "osi approved", "dual", "other"}

# Phrases that identify a licence text, more specific ones first: GNU texts quote others.
_TEXTS = (
    ("GNU AFFERO GENERAL PUBLIC LICENSE", "AGPL-3.0"),
    ("GNU LESSER GENERAL PUBLIC LICENSE", "LGPL"),
    ("GNU LIBRARY GENERAL PUBLIC LICENSE", "LGPL"),
    ("GNU GENERAL PUBLIC LICENSE", "GPL"),
    ("MOZILLA PUBLIC LICENSE", "MPL-2.0"),
    ("ECLIPSE PUBLIC LICENSE", "EPL-2.0"),
    ("APACHE LICENSE", "Apache-2.0"),
    ("PYTHON SOFTWARE FOUNDATION LICENSE VERSION 2", "PSF-2.0"),
    ("THIS IS FREE AND UNENCUMBERED SOFTWARE RELEASED INTO THE PUBLIC DOMAIN", "Unlicense"),
    ("CC0 1.0 UNIVERSAL", "CC0-1.0"),
    ("NEITHER THE NAME", "BSD-3-Clause"),
    ("NAMES OF ITS CONTRIBUTORS MAY NOT BE USED TO ENDORSE", "BSD-3-Clause"),
    ("REDISTRIBUTION AND USE IN SOURCE AND BINARY FORMS", "BSD-2-Clause"),
    ("PERMISSION IS HEREBY GRANTED, FREE OF CHARGE, TO ANY PERSON OBTAINING A COPY", "MIT"),
    ("PERMISSION TO USE, COPY, MODIFY, AND/OR DISTRIBUTE THIS SOFTWARE FOR ANY PURPOSE", "ISC"),
    ("PERMISSION TO USE, COPY, MODIFY, AND DISTRIBUTE THIS SOFTWARE FOR ANY PURPOSE", "ISC"),
    ("THIS SOFTWARE IS PROVIDED 'AS-IS', WITHOUT ANY EXPRESS OR IMPLIED WARRANTY", "Zlib"),
)

LICENCE_FILE = re.compile(r"(?i)(licen[cs]e|copying|unlicense)([-._].*)?")
"""Names of files that hold a licence text."""


def licence_of_metadata(metadata: Message, licence_texts: Iterable[str] = ()) -> str:
    """The licence that a distribution declares: expression, field, classifiers, then its files.

    metadata: headers of METADATA or PKG-INFO; licence_texts: licence files beside it.
    """
    expression = str(metadata.get("License-Expression") or "").strip()
    if expression:
        return expression
    texts = [found for text in licence_texts if (found := licence_of_text(text)) != UNKNOWN]
    field = str(metadata.get("License") or "").strip()
    found = _named(field) if len(field) < 80 else licence_of_text(field)
    if found == UNKNOWN:
        classifiers = [str(c).split("::") for c in metadata.get_all("Classifier", [])]
        named = {_named(c[-1]) for c in classifiers if c[0].strip() == "License" and len(c) > 1}
        # Several classifiers: which of them holds is not said, so all must be permissive.
        found = " AND ".join(sorted(named - {""})) or UNKNOWN
    if found == UNKNOWN and texts:
        return " AND ".join(sorted(set(texts)))
    if found == "BSD" and len(set(texts)) == 1 and texts[0].startswith("BSD"):
        return texts[0]
    return found


def licence_of_text(text: str) -> str:
    """The licence whose wording the text holds, or `unknown`."""
    wording = " ".join(text.upper().replace("’", "'").split())
    hits = [(wording.find(phrase), name) for phrase, name in _TEXTS if phrase in wording]
    if not hits:
        return UNKNOWN
    # The title or first clause decides; for one position the order above does (BSD-3 over BSD-2).
    names = [name for _, name in hits]
    if "BSD-3-Clause" in names and "BSD-2-Clause" in names:
        hits = [hit for hit in hits if hit[1] != "BSD-2-Clause"]
        hits = [
            (wording.find("REDISTRIBUTION AND USE"), n) if n == "BSD-3-Clause" else (at, n)
            for at, n in hits
        ]
    if re.match(r"\W*(THE )?MIT LICENSE", wording):
        return "MIT"
    return min(hits, key=lambda hit: hit[0])[1]


_SPDX_LINE = re.compile(r"SPDX-License-Identifier:\s*([^\n*]+)")
_GNU_HEADER = re.compile(
    r"(?i)under the terms of the (?:\W|the)*GNU (?:(lesser|library) )?(?:general|affero)"
)


def licence_of_header(text: str) -> str | None:
    """The licence that the first lines of a source file claim for that file, if they do."""
    head = text[:3000]
    if "SPDX" in head and (found := _SPDX_LINE.search(head)):
        return found[1].strip().rstrip("#-/ ").strip("\"'")
    if "gnu" not in head.lower():  # most files: the rest takes ten times as long
        return None
    comments = " ".join(head.replace("#", " ").split())
    if found := _GNU_HEADER.search(comments):
        return "LGPL" if found[1] else "GPL"
    return None


def is_permissive(licence: str) -> bool:
    """Whether a licence expression allows use with no more than attribution.

    `A OR B` needs one permissive side, `A AND B` both; `GPL WITH GCC-exception` covers
    compiler runtime libraries inside wheels and does not touch their Python files.
    """
    text = licence
    while inner := re.search(r"\(([^()]*)\)", text):
        value = "MIT" if is_permissive(inner[1]) else UNKNOWN
        text = f"{text[: inner.start()]} {value} {text[inner.end() :]}"
    if "(" in text or ")" in text:
        return False
    sides = [re.split(" AND ", side, flags=re.I) for side in re.split(" OR ", text, flags=re.I)]
    return any(all(map(_is_permissive_name, side)) for side in sides)


def _is_permissive_name(text: str) -> bool:
    name, _, exception = text.strip().partition(" WITH ")
    return name in PERMISSIVE or exception.strip().startswith("GCC-exception")


def _named(name: str) -> str:
    """SPDX for a licence name as people write it; "" for a name that states no licence."""
    name = name.strip()
    if name in PERMISSIVE:
        return name
    plain = re.sub(r"[^a-z0-9.]+", " ", name.lower())
    plain = re.sub(r"\b(the|licen[cs]ed?|v|version|under|style|or|later)\b", " ", plain)
    plain = " ".join(re.sub(r"\bv(?=\d)", "", plain).split()).strip(".")
    if plain in _NO_LICENCE:
        return ""
    if plain in _NAMES:
        return _NAMES[plain]
    if name and all(part.strip(" ()") in PERMISSIVE for part in re.split(r" OR | AND ", name)):
        return name
    return UNKNOWN if not plain else _gnu(name) or UNKNOWN


def _gnu(name: str) -> str | None:
    """Recognise GNU licence names, for the counts per licence to say what was left out."""
    upper = name.upper()
    if "AGPL" in upper or "AFFERO" in upper:
        return "AGPL-3.0"
    if "LGPL" in upper or "LESSER" in upper:
        return "LGPL"
    if "GPL" in upper or "GNU GENERAL" in upper:
        return "GPL"
    return None
