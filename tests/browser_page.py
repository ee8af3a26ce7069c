"""What tests ask of a page in a browser, and do to it."""


def texts(browser, selector: str) -> list[str]:
    return browser.execute_script(
        "return [...document.querySelectorAll(arguments[0])].map((e) => e.textContent)", selector
    )


def set_control(browser, id: str, value) -> None:
    """As a person who moves a slider or picks an entry."""
    browser.execute_script(
        "const e = document.getElementById(arguments[0]); e.value = arguments[1];"
        "e.dispatchEvent(new Event('input', {bubbles: true}));",
        *(id, str(value)),
    )
