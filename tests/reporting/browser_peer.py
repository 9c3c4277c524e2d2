"""Open a report in headless Chromium as a reader would; run manually, as it needs a browser.

    pip install playwright
    python tests/reporting/browser_peer.py REPORT.html SCREENSHOTS [--chromium=/usr/bin/chromium]

Checks: no console output, no request but the file itself, every figure drawn, no horizontal
scrolling of the page on a phone, and for every layer each token's colours and title equal to the
JSON in the page. Writes wide and phone screenshots, light and dark.
"""

import argparse
import json
from pathlib import Path

from playwright.sync_api import Page, sync_playwright

SIZES = {"wide": (1400, 1000), "phone": (390, 844)}


def arguments(told: str | None, what: str) -> argparse.Namespace:
    """Those of a check in a browser, with `screenshots` created. told: its help; what: the name of
    its first argument."""
    parser = argparse.ArgumentParser(
        description=told, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(what, type=Path)
    parser.add_argument("screenshots", type=Path)
    parser.add_argument("--chromium", default="/usr/bin/chromium")
    args = parser.parse_args()
    args.screenshots.mkdir(parents=True, exist_ok=True)
    return args


def check_tokens(page: Page) -> int:
    """Returns the number of (layer, token) pairs compared."""
    if not page.query_selector("#choices"):
        return 0
    data = json.loads(
        page.inner_text("#choices") or page.eval_on_selector("#choices", "e => e.textContent")
    )
    layers = len(page.query_selector_all("#layer option"))
    compared = 0
    for layer in range(layers):
        page.select_option("#layer", str(layer))
        shown = page.eval_on_selector_all(
            ".tokens",
            "boxes => boxes.map(box => [box.dataset.text, [...box.children].map(s => "
            "[s.dataset.experts, s.title, s.style.backgroundColor, s.style.borderColor])])",
        )
        for name, spans in shown:
            text = data["texts"][name]
            assert len(spans) == len(text["experts"][layer])
            for span, chosen, gates in zip(
                spans, text["experts"][layer], text["gates"][layer], strict=True
            ):
                assert span[0] == " ".join(map(str, chosen))
                for title, expert, gate in zip(span[1].split(", "), chosen, gates, strict=True):
                    said, _, value = title.rpartition(" ")
                    assert said == data["names"][expert]
                    assert abs(float(value) - gate) < 0.0051
                colour = data["colours"][chosen[0] % len(data["colours"])].lstrip("#")
                rgb = ", ".join(str(int(colour[i : i + 2], 16)) for i in (0, 2, 4))
                assert span[2].startswith(f"rgba({rgb}"), (span, chosen)
                compared += 1
    return compared


def main() -> None:
    args = arguments(__doc__, "report")
    url = args.report.resolve().as_uri()
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=args.chromium, args=["--no-sandbox"])
        for size, (width, height) in SIZES.items():
            for scheme in ("light", "dark"):
                page = browser.new_page(
                    viewport={"width": width, "height": height}, color_scheme=scheme
                )  # type: ignore[arg-type]
                said, asked = [], []
                page.on("console", lambda message, said=said: said.append(message.text))
                page.on("pageerror", lambda error, said=said: said.append(str(error)))
                page.on("request", lambda request, asked=asked: asked.append(request.url))
                page.on("dialog", lambda dialog, said=said: said.append(f"dialog {dialog.message}"))
                page.goto(url)
                assert not said, said
                assert asked == [url], asked
                boxes = [figure.bounding_box() for figure in page.query_selector_all("figure svg")]
                assert boxes and all(
                    box and box["width"] > 100 and box["height"] > 50 for box in boxes
                )
                wide = page.evaluate("document.documentElement.scrollWidth")
                assert wide <= width, f"{size}: the page is {wide} wide"
                compared = check_tokens(page)
                page.screenshot(path=args.screenshots / f"{size}_{scheme}.png", full_page=True)
                assert not said, said
                print(
                    f"{size}, {scheme}: {len(boxes)} figures, {compared} tokens by layer compared,"
                    " no message, no request"
                )
                page.close()
        browser.close()


if __name__ == "__main__":
    main()
