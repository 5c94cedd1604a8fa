"""Draw icon.png and banner.png, which the registry shows beside the pack's name: python docs/images/draw.py"""

from math import cos, pi, sin
from pathlib import Path

from matplotlib import get_data_path
from PIL import Image, ImageChops, ImageDraw, ImageFont

FOLDER = Path(__file__).parent
FONT = Path(get_data_path(), "fonts", "ttf", "DejaVuSans.ttf")
# Everything is drawn this much larger, and shrunk at the end, for smooth edges.
SMOOTH = 4
PAPER, FILM, HOLE, INK, GREY = "#fbf1e6", "#40323f", "#fbf1e6", "#40323f", "#8d7683"
# Body, its shade, the frame behind it and the shadow on that.
MOCHI = (
    ("#f9b8c4", "#ee98a9", "#fde6e6", "#f6cdd2"),
    ("#fffdf8", "#efe0d2", "#f5d8b8", "#e6bf97"),
    ("#bfdba2", "#a1c583", "#e8f2db", "#cfe0ba"),
)


def main() -> None:
    save(icon(), "icon.png", (400, 400))
    save(banner(), "banner.png", (1260, 540))


def save(image: Image.Image, name: str, size: tuple[int, int]) -> None:
    image.resize(size, Image.Resampling.LANCZOS).save(FOLDER / name, optimize=True)


def icon() -> Image.Image:
    image = Image.new("RGB", (400 * SMOOTH, 400 * SMOOTH), PAPER)
    film = strip(frame=112, gap=22, height=180)
    image.paste(film, ((image.width - film.width) // 2, (image.height - film.height) // 2), film)
    return image


def banner() -> Image.Image:
    image = Image.new("RGB", (1260 * SMOOTH, 540 * SMOOTH), PAPER)
    film = strip(frame=172, gap=18, height=216)
    image.paste(film, (64 * SMOOTH, (image.height - film.height) // 2), film)
    write(image, (704, 170), "Mochi Nodes", 76, INK, 5)
    write(image, (707, 276), "Mochi 1 in ComfyUI: text, image", 30, GREY, 0)
    write(image, (707, 320), "and video to video, and editing", 30, GREY, 0)
    return image


def write(image: Image.Image, place: tuple[int, int], text: str, size: int, colour: str, bold: int) -> None:
    """A stroke around the letters makes them bold and their corners round."""
    x, y = place
    font = ImageFont.truetype(FONT, size * SMOOTH)
    ImageDraw.Draw(image).text(
        (x * SMOOTH, y * SMOOTH), text, colour, font, stroke_width=bold * SMOOTH // 2, stroke_fill=colour
    )


def strip(frame: int, gap: int, height: int) -> Image.Image:
    """Three frames of film, `frame` wide, with rows of holes above and below."""
    frame, gap, height = frame * SMOOTH, gap * SMOOTH, height * SMOOTH
    edge = frame // 3
    film = Image.new("RGBA", (3 * frame + 4 * gap, height + 2 * edge))
    draw = ImageDraw.Draw(film)
    draw.rounded_rectangle((0, 0, film.width - 1, film.height - 1), frame // 8, FILM)
    for number, (body, shade, behind, shadow) in enumerate(MOCHI):
        left = gap + number * (frame + gap)
        middle, floor, width = left + frame // 2, edge + height * 7 // 8, frame * 5 // 6
        draw.rounded_rectangle((left, edge, left + frame, edge + height), frame // 10, behind)
        rise = (0, height // 3, 0)[number]
        reach = width * 9 // 20 - rise // 4
        draw.ellipse((middle - reach, floor - width // 14, middle + reach, floor + width // 14), shadow)
        mochi(film, (middle, floor - rise), width, body, shade)
    holes(draw, film.size, edge)
    return film


def holes(draw: ImageDraw.ImageDraw, size: tuple[int, int], edge: int) -> None:
    width, height = edge * 2 // 5, edge * 2 // 5
    count = size[0] // (2 * width)
    for number in range(count):
        middle = (number + 0.5) * size[0] / count
        for y in (edge // 2, size[1] - edge // 2):
            box = (middle - width / 2, y - height / 2, middle + width / 2, y + height / 2)
            draw.rounded_rectangle(box, width // 3, HOLE)


def mochi(image: Image.Image, foot: tuple[int, int], width: int, body: str, shade: str) -> None:
    """A rice cake that stands on `foot`: a dome over a flat, round-edged bottom, light from above."""
    shape = Image.new("L", image.size)
    ImageDraw.Draw(shape).polygon(outline(foot, width), 255)
    lit = ImageChops.multiply(shape, ImageChops.offset(shape, -width // 24, -width // 12))
    image.paste(shade, mask=shape)
    image.paste(body, mask=lit)
    x, y = foot
    shine = Image.new("L", (width // 5, width // 12))
    ImageDraw.Draw(shine).ellipse((0, 0, shine.width - 1, shine.height - 1), 200)
    shine = shine.rotate(24, expand=True, resample=Image.Resampling.BICUBIC)
    image.paste("#ffffff", (x - width // 3, y - width * 5 // 9), shine)


def outline(foot: tuple[int, int], width: int, points: int = 360) -> list[tuple[float, float]]:
    x, y = foot
    top, bottom = width * 0.46, width * 0.2
    return [
        (
            x + width / 2 * power(cos(angle), 0.8),
            y - bottom - (top * power(sin(angle), 0.95) if sin(angle) > 0 else bottom * power(sin(angle), 0.6)),
        )
        for angle in (2 * pi * i / points for i in range(points))
    ]


def power(base: float, exponent: float) -> float:
    return abs(base) ** exponent * (1 if base > 0 else -1)


if __name__ == "__main__":
    main()
