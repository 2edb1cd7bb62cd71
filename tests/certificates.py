"""Certificates for tests of TLS, made with the openssl command."""

import subprocess

from product import need

NEW_KEY = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]


def openssl(*args, **kwargs):
    subprocess.run(
        ["openssl", *map(str, args)],
        check=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        **kwargs,
    )


class Authority:
    """A private certificate authority."""

    def __init__(self, folder):
        need("openssl")
        folder.mkdir()
        self.folder, self.cert, self.key = folder, folder / "ca.pem", folder / "ca.key"
        openssl(
            "req",
            "-x509",
            *NEW_KEY,
            "-keyout",
            self.key,
            "-out",
            self.cert,
            "-days",
            "9",
            "-subj",
            "/CN=test authority",
            "-addext",
            "keyUsage=critical,keyCertSign",
        )

    def issue(self, name, host="IP:127.0.0.1", start="20200101000000Z", end="20991231235959Z"):
        """A file with a certificate for `host` and its key."""
        key, request, pem = (self.folder / (name + end_) for end_ in (".key", ".csr", ".pem"))
        openssl(
            "req",
            "-new",
            *NEW_KEY,
            "-keyout",
            key,
            "-out",
            request,
            "-subj",
            "/CN=" + name,
        )
        conf = self.folder / (name + ".cnf")
        conf.write_text(
            "[ca]\ndefault_ca=a\n[a]\ndatabase={0}/db\nnew_certs_dir={0}\nserial={0}/serial\n"
            "default_md=sha256\npolicy=p\nunique_subject=no\n[p]\ncommonName=supplied\n"
            "[e]\nsubjectAltName={1}\n".format(self.folder, host)
        )
        (self.folder / "db").touch()
        openssl(
            "ca",
            "-batch",
            "-config",
            conf,
            "-extensions",
            "e",
            "-create_serial",
            "-notext",
            "-cert",
            self.cert,
            "-keyfile",
            self.key,
            "-in",
            request,
            "-out",
            pem,
            "-startdate",
            start,
            "-enddate",
            end,
        )
        with open(str(pem), "a") as handle:
            handle.write(key.read_text())
        return pem
