import pytest

from codellama.data.languages import kind_of, language_of

NAMES = """
a.py python|a.pyi python-stub|a.js javascript|a.mjs javascript|a.ts typescript|a.c c
a.h c|a.cpp cpp|a.hpp cpp|a.cc cpp|a.cs csharp|a.java java|a.kt kotlin|a.go go|a.rs rust
a.rb ruby|a.php php|a.swift swift|a.scala scala|a.pl perl|a.lua lua|a.R r|a.r r
a.jl julia|a.hs haskell|a.ml ocaml|a.ex elixir|a.erl erlang|a.clj clojure|a.dart dart
a.m objective-c|a.sh bash|a.ps1 powershell|a.sql sql|a.html html|a.css css|a.scss scss
a.vue vue|a.md markdown|a.rst restructuredtext|a.txt text|a.json json|a.yaml yaml
a.toml toml|Makefile make|Dockerfile docker|CMakeLists.txt cmake|a.f90 fortran
a.asm nasm|a.v verilog|a.sv systemverilog|a.vhd vhdl|a.lisp common-lisp|a.scm scheme
a.el emacs-lisp|a.groovy groovy|a.tcl tcl|a.awk awk|a.zig zig|a.d d|a.cu cuda
a.proto protobuf|a.tf terraform|a.sol solidity|a.fs fsharp|a.adb ada|a.tex tex
a.ipynb notebook|x/y/Rakefile ruby|README text
"""


@pytest.mark.parametrize("line", NAMES.strip().replace("\n", "|").split("|"))
def test_by_name(line: str) -> None:
    name, language = line.split()
    assert language_of(name) == language


@pytest.mark.parametrize(
    ("head", "language"),
    [
        (b"#!/bin/sh\n", "bash"),
        (b"#!/usr/bin/env python3\n", "python"),
        (b"#!/usr/bin/env -S node --x\n", "javascript"),
        (b"#! /usr/bin/perl -w\n", "perl"),
        (b"#!/usr/bin/python3.11 -u\n", "python"),
        (b"#!/usr/bin/env LANG=C ruby\n", "ruby"),
        (b"#!\n", None),
        (b"#!/usr/bin/env\n", None),
        (b"\x7fELF", None),
        (b"hello", None),
    ],
)
def test_by_first_line_where_there_is_no_ending(head: bytes, language: str | None) -> None:
    assert language_of("bin/script", head) == language
    assert language_of("a.js", head) == "javascript"


def test_what_says_nothing() -> None:
    assert language_of("a.unknown-ending") is None
    assert language_of("LICENSE") is None
    assert language_of(".hidden") is None


def test_prose_is_text_about_code() -> None:
    assert kind_of("markdown") == "code-text"
    assert kind_of("rust") == "code"
