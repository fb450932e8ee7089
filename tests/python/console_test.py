"""The gateway's console in a real headless Chromium: a generation seen token by token, at three widths, in light and dark.

    python console_test.py --binary ../../target/release/specattn [--screenshots ../../docs/console]

Chromium is the one that playwright brings, or what the environment variable SPECATTN_TEST_CHROMIUM names.

Exit status: 0 passed, 1 failed, 77 skipped because playwright or Chromium is missing (with a line on stderr that begins with
SKIPPED).
"""

import argparse
import os
import pathlib
import signal
import sys
import unittest

from local_server import serve

try:
    from playwright.sync_api import Error, expect, sync_playwright
except ImportError as missing:
    print(f"SKIPPED: the console test needs playwright: {missing}", file=sys.stderr)
    sys.exit(77)

# Wide enough for side-by-side plots, for one column, and a phone.
WIDTHS = {"wide": (1280, 1500), "middle": (820, 1500), "phone": (390, 1800)}
PAGE_BYTES = 200_000

url = browser = screenshots = None


class Console(unittest.TestCase):
    def open(self, size=WIDTHS["wide"], scheme="light"):
        context = browser.new_context(
            viewport={"width": size[0], "height": size[1]}, color_scheme=scheme, reduced_motion="reduce"
        )
        self.addCleanup(context.close)
        page = context.new_page()
        page.set_default_timeout(60_000)
        self.wrong, self.asked, self.bytes = [], [], 0
        page.on("console", lambda said: self.wrong.append(said.text) if said.type == "error" else None)
        page.on("pageerror", lambda error: self.wrong.append(str(error)))
        page.on("request", lambda request: self.asked.append(request.url))
        page.on("response", self.weigh)
        page.goto(url)
        expect(page.locator("#summary")).to_contain_text("workers: 2", timeout=60_000)
        return page

    def weigh(self, response):
        path = response.url.removeprefix(url)
        if path == "/console" or path.endswith((".js", ".css")):
            self.bytes += len(response.body())

    def generate(self, page, tokens, mode="exact", prompt=None):
        if prompt:
            page.fill("#prompt", prompt)
        page.select_option("#mode", mode)
        page.fill("#tokens", str(tokens))
        page.click("#start")

    def tokens(self, page):
        """Tokens shown so far, by origin."""
        counted = page.locator("#legend output").all()
        return {output.get_attribute("data-origin"): int(output.text_content() or 0) for output in counted}

    def assert_healthy(self):
        self.assertEqual(self.wrong, [], "the page complains of nothing")
        self.assertTrue(all(asked.startswith(url) for asked in self.asked), "it asks nobody else")
        self.assertLess(self.bytes, PAGE_BYTES)
        self.assertGreater(self.bytes, 1_000)

    def test_tokens_arrive_while_they_are_made(self):
        page = self.open()
        # Enough for the page to look several times, however fast the build.
        self.generate(page, 2000)
        state = page.locator("#session-state")
        expect(state).to_contain_text("of output", timeout=60_000)
        seen = []
        while "finished" not in (state.text_content() or ""):
            seen.append(sum(self.tokens(page).values()))
            page.wait_for_timeout(30)
        counts = self.tokens(page)
        self.assertGreater(len(set(seen)), 3, f"the text grew before their eyes: {seen[:50]}")
        self.assertEqual(sum(counts.values()), 2000)
        self.assertGreater(counts["accepted"], 100, counts)
        self.assertGreater(counts["recovered"] + counts["bonus"], 10, counts)
        shown = page.locator("#text").inner_text()
        self.assertGreater(len(shown), 800)
        for origin in ("accepted", "recovered", "bonus"):
            self.assertGreater(page.locator(f"#text .{origin}").count(), 0, origin)
        self.assert_healthy()

    def test_the_heat_map_shows_what_masks_keep(self):
        page = self.open()
        self.generate(page, 3000, prompt="The old house by the river stood empty. " * 60)
        canvas = page.locator("#kept canvas")
        expect(canvas).to_be_visible(timeout=60_000)
        label = canvas.get_attribute("aria-label")
        self.assertIn("By layer", label)
        painted = canvas.evaluate(
            "c => c.getContext('2d').getImageData(0, 0, c.width, c.height).data.filter((x, i) => i % 4 === 3 && x > 0).length"
        )
        self.assertGreater(painted, 100)
        # The session is in the table, and can be chosen from it with the keyboard.
        button = page.locator("#sessions button").first
        button.focus()
        page.keyboard.press("Enter")
        expect(button).to_have_attribute("aria-pressed", "true")
        page.click("#stop")
        expect(page.locator("#session-state")).to_contain_text("left by its client", timeout=60_000)
        self.assert_healthy()

    def test_everything_is_reached_by_the_keyboard(self):
        page = self.open()
        reached = []
        for _ in range(12):
            page.keyboard.press("Tab")
            reached.append(page.evaluate("document.activeElement.id || document.activeElement.className"))
        for wanted in ("skip", "prompt", "mode", "tokens", "temperature", "start", "text"):
            self.assertIn(wanted, reached)
        page.focus("#tokens")
        page.keyboard.press("Control+A")
        page.keyboard.type("16")
        page.keyboard.press("Enter")
        expect(page.locator("#session-state")).to_contain_text("16 of output; finished: length", timeout=60_000)
        self.assert_healthy()

    def test_it_fits_every_width_in_light_and_dark(self):
        for scheme in ("light", "dark"):
            for name, size in WIDTHS.items():
                with self.subTest(scheme=scheme, width=size[0]):
                    page = self.open(size, scheme)
                    self.generate(page, 2000, prompt="The old house by the river stood empty. " * 40)
                    expect(page.locator("#kept canvas")).to_be_visible(timeout=60_000)
                    # Plots want a few readings.
                    page.wait_for_timeout(3_000)
                    across = page.evaluate("document.documentElement.scrollWidth")
                    self.assertLessEqual(across, size[0], "nothing is cut off at the side")
                    ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
                    light = sum(int(part) for part in ground[4:-1].split(",")[:3]) > 380
                    self.assertEqual(light, scheme == "light", ground)
                    if screenshots and (scheme == "light" or name == "wide"):
                        suffix = "" if scheme == "light" else "-dark"
                        page.screenshot(path=screenshots / f"{name}{suffix}.png", full_page=True)
                    self.assert_healthy()
                    page.close()

    def test_a_gateway_that_refuses_says_why(self):
        page = self.open()
        self.generate(page, 10, prompt=" ")
        page.fill("#temperature", "1.5")
        page.fill("#prompt", "word " * 40_000)
        page.click("#start")
        expect(page.locator("#session-state")).to_contain_text("Not generated", timeout=60_000)


def main():
    global url, browser, screenshots
    parser = argparse.ArgumentParser()
    parser.add_argument("--binary", type=pathlib.Path, required=True)
    parser.add_argument("--screenshots", type=pathlib.Path)
    arguments = parser.parse_args()
    screenshots = arguments.screenshots
    if screenshots:
        screenshots.mkdir(parents=True, exist_ok=True)
    with sync_playwright() as playwright:
        try:
            browser = playwright.chromium.launch(
                executable_path=os.environ.get("SPECATTN_TEST_CHROMIUM"), args=["--no-sandbox"]
            )
        except Error as missing:
            print(f"SKIPPED: the console test needs Chromium: {str(missing).splitlines()[0]}", file=sys.stderr)
            sys.exit(77)
        process, url = serve(arguments.binary.resolve())
        try:
            result = unittest.main(argv=["console_test"], exit=False, verbosity=2).result
        finally:
            browser.close()
            process.send_signal(signal.SIGTERM)
            process.wait(timeout=30)
    sys.exit(0 if result.wasSuccessful() else 1)


if __name__ == "__main__":
    main()
