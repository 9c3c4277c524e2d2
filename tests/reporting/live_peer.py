"""Watch the demo in headless Chromium while it runs, is killed and starts again; run manually, as
it needs a browser.

    pip install playwright
    python -m tests.reporting.live_peer WORKDIR SCREENSHOTS

Checks: no console output, no request but the page's own, no horizontal scrolling on a phone, and
that steps and curves move, stand still while nothing runs, and move again. Writes wide and phone
screenshots, light and dark, of each of these three.
"""

import re
import subprocess
import time

from playwright.sync_api import Page, sync_playwright

from tests.reporting.browser_peer import SIZES, arguments

BTX = ".venv/bin/btx"
PORT, PATIENCE = 8623, 900  # seconds
URL = f"http://127.0.0.1:{PORT}/"


def progress(page: Page) -> tuple[int, int]:
    """(training steps of all stages, length of what draws all curves)."""
    table = page.inner_text("#body")
    lengths = page.eval_on_selector_all(
        "figure svg path", "paths => paths.map(p => p.getAttribute('d').length)"
    )
    return sum(int(done) for done in re.findall(r"(\d+)/\d+", table)), sum(lengths)


def moved(page: Page, before: tuple[int, int]) -> tuple[int, int]:
    """Wait until there are more steps, and other curves, than before."""
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        now = progress(page)
        if now[0] > before[0] and now[1] != before[1]:
            return now
        time.sleep(1)
    raise AssertionError(f"nothing moved: {before}")


def main() -> None:
    args = arguments(__doc__, "workdir")
    args.workdir.mkdir(parents=True, exist_ok=True)
    run = [BTX, "run", "demo", f"--workdir={args.workdir}"]
    watch = subprocess.Popen(
        [BTX, "watch", str(args.workdir), f"--port={PORT}", "--every=2"],
        stdout=subprocess.DEVNULL,
    )
    running = subprocess.Popen(run, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(
                executable_path=args.chromium, args=["--no-sandbox"]
            )
            pages, said, asked = {}, [], set()
            for size, (width, height) in SIZES.items():
                for scheme in ("light", "dark"):
                    page = browser.new_page(
                        viewport={"width": width, "height": height}, color_scheme=scheme
                    )  # type: ignore[arg-type]
                    page.on("console", lambda message: said.append(message.text))
                    page.on("pageerror", lambda error: said.append(str(error)))
                    page.on("request", lambda request: asked.add(request.url))
                    pages[size, scheme] = page

            def shoot(when: str) -> None:
                for (size, scheme), page in pages.items():
                    wide = page.evaluate("document.documentElement.scrollWidth")
                    assert wide <= SIZES[size][0], f"{size}: the page is {wide} wide"
                    name = f"live_{when}_{size}_{scheme}.png"
                    page.screenshot(path=args.screenshots / name, full_page=True)
                print(f"{when}: steps and curves {progress(first)}", flush=True)

            time.sleep(10)  # until the server listens
            for page in pages.values():
                page.goto(URL)
            first = pages["wide", "light"]
            now = moved(first, moved(first, (0, 0)))
            shoot("running")
            running.kill()
            running.wait()
            time.sleep(5)
            stopped = progress(first)
            time.sleep(20)
            assert progress(first) == stopped >= now
            shoot("killed")
            running = subprocess.Popen(run, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            moved(first, moved(first, stopped))
            shoot("resumed")
            assert not said, said
            assert asked == {URL, f"{URL}body"}, asked
            print("no message on the console, no other request")
            browser.close()
    finally:
        running.kill()
        watch.terminate()


if __name__ == "__main__":
    main()
