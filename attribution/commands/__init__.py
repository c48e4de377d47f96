"""The commands of `attribute`. Nothing heavy is imported before one of them runs."""

import click

from attribution.commands.build import build, export
from attribution.commands.doctor import doctor
from attribution.commands.magic import magic
from attribution.commands.metasmoothness import metasmoothness
from attribution.commands.pipelines import ekfac, less, source, trackstar, trak
from attribution.commands.query import query
from attribution.commands.score import score
from attribution.commands.select import select
from attribution.commands.validate import validate

attribute_group = click.Group("attribute", help="Gradient influence of pool rows on a query.")
for command in (
    build, score, select, query, export, doctor, validate, trackstar, ekfac, trak, less, source,
    magic, metasmoothness,
):  # fmt: skip
    attribute_group.add_command(command)
