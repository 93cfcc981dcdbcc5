import email
import sysconfig
from pathlib import Path

import pytest
from trees import MIT_TEXT

from codellama.data.licences import (
    is_permissive,
    licence_of_header,
    licence_of_metadata,
    licence_of_text,
)


@pytest.mark.parametrize(
    ("licence", "permissive"),
    [
        ("MIT", True),
        ("BSD", True),
        ("Apache-2.0 OR GPL-3.0-only", True),
        ("Apache-2.0 AND GPL-3.0-only", False),
        ("MIT AND (GPL-2.0-only OR BSD-3-Clause)", True),
        ("(MIT) AND (GPL-2.0-only OR LGPL-2.1)", False),
        ("(MIT AND GPL-2.0-only)", False),
        ("GPL-2.0-only AND MIT OR Apache-2.0", True),  # AND binds more tightly
        ("Apache-2.0 WITH LLVM-exception", True),
        ("BSD-3-Clause AND GPL-3.0-or-later WITH GCC-exception-3.1", True),
        ("GPL-3.0-or-later WITH Autoconf-exception-3.0", False),
        ("MPL-2.0", False),
        ("LicenseRef-Proprietary", False),
        ("unknown", False),
        ("", False),
    ],
)
def test_is_permissive(licence: str, permissive: bool) -> None:
    assert is_permissive(licence) is permissive


@pytest.mark.parametrize(
    ("headers", "expected"),
    [
        ("License-Expression: MIT OR Apache-2.0\nLicense: GPL\n", "MIT OR Apache-2.0"),
        ("License: Apache License, Version 2.0\n", "Apache-2.0"),
        ("License: Apache 2.0 License\n", "Apache-2.0"),
        ("License: New BSD\n", "BSD-3-Clause"),
        ("License: BSD 3-Clause License\n", "BSD-3-Clause"),
        ("License: MIT License\n", "MIT"),
        ("License: GPLv3\n", "GPL"),
        ("License: LGPL-3.0-or-later\n", "LGPL"),
        ("License: Our own terms\n", "unknown"),
        ("Classifier: License :: OSI Approved :: MIT License\n", "MIT"),
        (
            "Classifier: License :: OSI Approved :: BSD License\n"
            "Classifier: License :: OSI Approved :: GNU General Public License v3 (GPLv3)\n",
            "BSD AND GPL",
        ),
        (
            "Classifier: License :: Freely Distributable\n"
            "Classifier: License :: OSI Approved :: Apache Software License\n",
            "Apache-2.0",
        ),
        ("Classifier: Programming Language :: Python\n", "unknown"),
        ("", "unknown"),
    ],
)
def test_licence_of_metadata(headers: str, expected: str) -> None:
    assert licence_of_metadata(email.message_from_string(headers + "\n")) == expected


def test_licence_files_decide_where_the_metadata_does_not() -> None:
    bsd = "Redistribution and use in source and binary forms, with or without modification"
    nothing = email.message_from_string("")
    assert licence_of_metadata(nothing, [MIT_TEXT]) == "MIT"
    assert licence_of_metadata(nothing, [MIT_TEXT, "GNU GENERAL PUBLIC LICENSE"]) == "GPL AND MIT"
    generic = email.message_from_string("License: BSD\n\n")
    assert licence_of_metadata(generic, [bsd]) == "BSD-2-Clause"
    assert licence_of_metadata(generic, [bsd + " neither the name of"]) == "BSD-3-Clause"


def test_licence_texts() -> None:
    python = Path(sysconfig.get_path("stdlib"), "LICENSE.txt")
    if python.is_file():
        assert licence_of_text(python.read_text()) == "PSF-2.0"
    apache = Path(__file__).parents[2] / "LICENSE"
    assert licence_of_text(apache.read_text()) == "Apache-2.0"
    assert (
        licence_of_text("GNU LESSER GENERAL PUBLIC LICENSE ... GNU General Public License")
        == "LGPL"
    )
    assert licence_of_text("All rights reserved.") == "unknown"


@pytest.mark.parametrize(
    ("header", "expected"),
    [
        ("# SPDX-License-Identifier: GPL-3.0-only\n", "GPL-3.0-only"),
        ("# SPDX-License-Identifier: MIT OR GPL-2.0-only\nx", "MIT OR GPL-2.0-only"),
        ("/* SPDX-License-Identifier: MIT */", "MIT"),
        ("# under the terms of the GNU General\n# Public License", "GPL"),
        ("# under the terms of the\n# GNU Lesser General Public License", "LGPL"),
        ("# This module prints the GNU General Public License\n", None),
        ("import os\n", None),
    ],
)
def test_licence_of_header(header: str, expected: str | None) -> None:
    assert licence_of_header(header) == expected
