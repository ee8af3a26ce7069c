"""APs / AP of several runs and of published detectors as bars: figure 3 of DePerceiver's paper.

    deperceiver visualize small_objects runs/a runs/b --published=deperceiver,detr --output=small_objects.png
    deperceiver visualize small_objects --published=deperceiver --output=figure3.png

Of runs it takes the evaluation of the last step; runs of one config that differ in their seed are one bar. Published
figures are of COCO and lie in deperceiver_jax/compare/published.json with their sources.
"""

from deperceiver_jax.compare.rows import group, names_of, published_rows, read_run, require_same_data
from deperceiver_jax.errors import UserError
from deperceiver_jax.files import as_path, require_readable
from deperceiver_jax.program.command_line import parse_flags, split_arguments
from deperceiver_jax.visualize.charts import draw_chart, require_charts
from deperceiver_jax.visualize.flags import small_objects_flags as define_flags
from deperceiver_jax.visualize.output import check_output, need, save_picture


def main(argv: list[str]) -> None:
    places, others = split_arguments(argv[1:], define_flags)
    folders = [as_path(place) for place in places]
    values, rest = parse_flags([argv[0], *others], define_flags, __doc__)
    if rest[1:]:
        raise UserError(f"{rest[1]}: bars take no config; each run has its own.")
    need(values, "output")
    check_output(values.output)
    for folder in folders:
        require_readable("A run", folder)
    require_charts()
    from deperceiver_jax.compare.charts import small_objects

    names = names_of(folders) if folders else []
    runs = [read_run(folder, name) for folder, name in zip(folders, names, strict=True)]
    require_same_data(runs)
    rows = [*group(runs, 0), *published_rows(values.published)]
    if not any(row.metrics.get("APs_over_AP", -1.0) >= 0 for row in rows):
        raise UserError("There is no bar to draw: name evaluated runs that found small objects, or --published.")
    chart = small_objects(rows).properties(width=420, title="Small objects: APs / AP")
    save_picture(draw_chart(chart), values.output)
    print(f"Wrote {values.output}.")
