"""Charts as pictures: Vega-Lite's descriptions, made with Altair, drawn without a browser or a network."""

import io

from PIL import Image

from deperceiver_jax.report import require_libraries

SCALE = 2  # pixels of the picture for one of the chart's


def draw_chart(chart) -> Image.Image:
    """An Altair chart as a picture, in the fonts that are installed."""
    import vl_convert

    described = chart.configure(font="DejaVu Sans, Arial, sans-serif", background="white", padding=16)
    described = described.configure_axis(labelFontSize=12, titleFontSize=13, gridColor="#e9ecef")
    described = described.configure_title(fontSize=16, subtitleFontSize=12, subtitleColor="#6c757d", anchor="start")
    described = described.configure_legend(labelFontSize=12, titleFontSize=12, labelLimit=320)
    png = vl_convert.vegalite_to_png(described.to_json(), scale=SCALE)
    return Image.open(io.BytesIO(png)).convert("RGB")


def require_charts() -> None:
    """Raises UserError where the libraries of charts are missing."""
    require_libraries("This picture")
