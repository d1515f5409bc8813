"""A plan as one self-contained HTML page: no script, no font and no picture from elsewhere."""

from ._page import PageContent as PageContent
from ._page import check_page_target as check_page_target
from ._page import render_page as render_page
from ._page import write_page as write_page
from ._page import write_pictures as write_pictures
from ._page import write_png_pictures as write_png_pictures
