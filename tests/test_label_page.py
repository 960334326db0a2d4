"""The server of the labelling page without a browser; with one it is tested in test_labelling."""
import pytest
from jupyter_server.services.kernels.connection.base import serialize_binary_message
from tornado.websocket import WebSocketClosedError

from nbs_lib.web.label_page import KernelSocket


def test_a_socket_that_was_closed_while_a_photo_was_on_its_way():
    handler = KernelSocket.__new__(KernelSocket)
    handler.ws_connection = None
    photo = serialize_binary_message({"header": {"msg_type": "comm_msg"}, "buffers": [memoryview(b"photo")]})
    with pytest.raises(WebSocketClosedError): handler.write_message(photo, True)
