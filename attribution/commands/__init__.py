"""The commands of `attribute`. Nothing heavy is imported before one of them runs."""

import click

from attribution.commands.build import build
from attribution.commands.score import score
from attribution.commands.select import select

attribute_group = click.Group("attribute", help="Gradient influence of pool rows on a query.")
for command in (build, score, select):
    attribute_group.add_command(command)
