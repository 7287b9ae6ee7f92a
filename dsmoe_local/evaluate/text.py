"""The texts that models are measured on: a file, standard input, or the built-in text.

The built-in text needs no download: its English and code come with Python, its Chinese with this project. It
differs between Python versions, so its name includes the version.
"""

from __future__ import annotations

import hashlib
import importlib
import platform
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from dsmoe_local.base.errors import FileError, FormatError
from dsmoe_local.base.text import safe_line
from dsmoe_local.base.text_files import decode_text

LICENCES = "English and code are Python's (PSF licence), the Chinese is this project's (MIT)"

# Characters of English and code per Chinese paragraph, so that a few windows contain all three.
_ENGLISH, _CODE = 3000, 2500
_TOPICS = "pydoc_data.topics"
_DOCUMENTED = ("argparse", "asyncio", "collections", "datetime", "decimal", "functools", "pathlib", "re")
_SOURCES = ("bisect", "textwrap", "fnmatch", "heapq", "shlex")


@dataclass(frozen=True, slots=True)
class Text:
    """A text with its name. Measurements can be compared only if the digests are equal."""

    name: str
    content: str

    @property
    def digest(self) -> str:
        """A hash of the content."""
        return hashlib.blake2b(self.content.encode(), digest_size=8).hexdigest()


def read_text(source: str | None) -> Text:
    """Read the text of a file, of standard input (`-`), or the built-in one (None).

    One newline at the end is dropped, as llama.cpp's tools do. Raises FileError, FormatError.
    """
    if source is None:
        return built_in()
    name = "standard input" if source == "-" else safe_line(Path(source).name, 80)
    try:
        raw = sys.stdin.buffer.read() if source == "-" else Path(source).read_bytes()
    except IsADirectoryError as error:
        raise FileError("this is a folder, not a text", where=source, remedy="name a file in it") from error
    except OSError as error:
        raise FileError(f"the text cannot be read: {error.strerror}", where=source) from error
    content = decode_text(raw, "the text", source).removesuffix("\n")
    if not content.strip():
        raise FormatError("the text is empty", where=source, remedy="name another text")
    return Text(name, content)


def built_in() -> Text:
    """Return the built-in text, which alternates English, Chinese and code."""
    english, code = _english(), _code()
    parts = []
    for chinese in _CHINESE.strip().split("\n\n"):
        parts += [_take(english, _ENGLISH), chinese, _take(code, _CODE)]
    return Text(f"built-in, Python {platform.python_version()}", "\n\n".join(filter(None, parts)))


def _take(paragraphs: Iterator[str], n_characters: int) -> str:
    """Return the next paragraphs, until they have `n_characters` in total."""
    taken: list[str] = []
    length = 0
    while length < n_characters:
        paragraph = next(paragraphs, None)
        if paragraph is None:
            break
        taken.append(paragraph)
        length += len(paragraph) + 2
    return "\n\n".join(taken)


def _paragraphs(text: str) -> Iterator[str]:
    return (paragraph for part in text.split("\n\n") if (paragraph := part.strip("\n").rstrip()))


def _english() -> Iterator[str]:
    """Yield paragraphs of Python's manual, which some systems do not install, and of module docstrings."""
    if find_spec(_TOPICS.partition(".")[0]) is not None:
        topics: dict[str, str] = importlib.import_module(_TOPICS).topics
        for name in sorted(topics):
            yield from _paragraphs(topics[name])
    for name in _DOCUMENTED:
        yield from _paragraphs(importlib.import_module(name).__doc__ or "")


def _code() -> Iterator[str]:
    """Yield paragraphs of modules' source code, without importing them."""
    for name in _SOURCES:
        spec = find_spec(name)
        if spec is not None and spec.origin is not None and spec.origin.endswith(".py"):
            yield from _paragraphs(Path(spec.origin).read_text(encoding="utf-8"))


# Written for this project, under its licence.
_CHINESE = """\
清晨的山村很安静，只有溪水从石头之间流过的声音。老人推开木门，先看一看东边的天色，再到院子里给那几棵柿子树浇水。他说，树和人一样，早上喝一口水，一整天都有精神。孩子们背着书包从门前走过，总要停下来问他今天会不会下雨。老人抬头看云，笑着说：“带上伞吧，雨不会大，可是路会滑。”傍晚果然下了一阵小雨，放学回来的孩子都说他比天气预报还准。

机器学习并不神秘。给计算机看许多例子，让它自己找出规律，这就是学习；遇到没有见过的问题，也能给出合理的答案，这才算学会了。语言模型所做的事情，是根据前面的文字猜测下一个词。猜得越准，说明它对语言的把握越好。人们用“困惑度”来衡量这种能力：数值越小，模型越不感到意外。不过，一个数字说明不了所有问题，读一读它写出来的文章，往往更有帮助。

混合专家模型把一个大网络拆成许多小网络，每个小网络叫做一位“专家”。读到一个词时，路由器只请其中几位专家来工作，其余的专家休息。这样一来，模型可以拥有很多参数，每一步的计算却不多。有些知识是所有词都需要的，于是又设置了共享专家，无论读到什么都会参与。专家分得越细，组合的方式就越多，每一位也就越专门。

城市里的图书馆晚上九点关门。周末的下午，靠窗的座位总是最先坐满。有人在准备考试，桌上堆着厚厚的参考书；有人只是来避暑，翻几页杂志就睡着了。管理员姓周，在这里工作了二十三年，许多读者的名字她都记得。有一次，一个小男孩来还书，书里夹着一张纸条，写着：“谢谢您推荐的故事，我最喜欢那只会说话的猫。”她把纸条收进抽屉，和其他几十张放在一起。

做一碗好吃的面条，要从和面开始。面粉五百克，清水二百三十毫升，再加一小撮盐。水要慢慢倒，一边倒一边搅，等到看不见干面粉，再用手揉成光滑的面团。盖上湿布，放半个小时，让它醒一醒。擀面的时候不要着急，力气要均匀，厚薄才会一致。水烧开以后下锅，煮三分钟左右，捞出来过一遍凉水，口感更有弹性。汤底可以用骨头慢慢熬，也可以只用酱油、醋和葱花，简单却不失风味。

二〇二四年的统计显示，全省高速铁路的运营里程超过两千公里，比十年前增加了一倍多。从省城出发，一个半小时以内可以到达大部分地级市。交通方便以后，周末短途旅行的人多了，沿线的小镇也热闹起来。当地政府提醒游客：节假日请提前购票，错峰出行；进入古镇核心区，机动车一律停放在镇外的停车场，换乘免费的电动公交车，全程大约十五分钟。

软件出了错误，首先要能重现它。记下当时的输入、版本和环境，把步骤一条一条写清楚，再试着去掉无关的部分，直到剩下最短的例子。这时候原因常常已经很明显了。修改之前，先写一个会失败的测试；修改之后，测试应当通过。如果只凭感觉改动代码，问题可能暂时消失，却会在别的地方再次出现。好的程序员并不是不犯错，而是不让同一个错误犯两次。

夜里下了一场大雪，第二天整个世界都变白了。河面结了冰，远处的山像一幅淡淡的水墨画。母亲说，瑞雪兆丰年，明年的麦子一定长得好。父亲扛着铁锹去扫门口的路，邻居们也陆续出来，大家一边干活一边聊天，呼出的白气在阳光里慢慢散开。到了中午，孩子们堆起一个比人还高的雪人，给它戴上一顶旧草帽，又用两颗黑纽扣做了眼睛。它就这样笑眯眯地站着，看着来来往往的人。
"""
