"""The browser, for tests of what pages share."""

from tests.browser import browser as browser
