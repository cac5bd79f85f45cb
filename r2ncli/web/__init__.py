"""HTTP for images and checkpoints: one client, retries, deadlines, and no secrets shown."""

from r2ncli.web.attempts import ATTEMPTS as ATTEMPTS
from r2ncli.web.attempts import CutOffError as CutOffError
from r2ncli.web.attempts import WebError as WebError
from r2ncli.web.attempts import retry as retry
from r2ncli.web.attempts import within as within
from r2ncli.web.client import ANSWER_SECONDS as ANSWER_SECONDS
from r2ncli.web.client import Client as Client
from r2ncli.web.response import Response as Response
from r2ncli.web.urls import check as check
from r2ncli.web.urls import is_file as is_file
from r2ncli.web.urls import is_web as is_web
from r2ncli.web.urls import local_path as local_path
from r2ncli.web.urls import requested as requested
from r2ncli.web.urls import scrubbed as scrubbed
from r2ncli.web.urls import without_secrets as without_secrets
