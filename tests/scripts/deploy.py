"""Compares what deploy/ says in two places, and tries what cloud-init would be given. Runs with the libraries of cfn-lint."""

import json
import pathlib
import re

import cfnlint.decode.cfn_yaml
import yaml

DEPLOY = pathlib.Path(__file__).resolve().parents[2] / "deploy"
NAMES = {"${AWS::Region}": "REGION", "${AWS::AccountId}": "ACCOUNT", "${AWS::Partition}": "aws", "${ClusterName}": "CLUSTER"}
# Of what has no resource that could be named (EC2's service authorization reference).
ON_EVERYTHING = re.compile(r"ec2:Describe[A-Za-z]+")


def plain(value):
    """Without the template's functions: Sub with its parameters' stand-ins."""
    if isinstance(value, dict):
        if list(value) == ["Fn::Sub"]:
            text = value["Fn::Sub"]
            for name, stand_in in NAMES.items():
                text = text.replace(name, stand_in)
            return text
        return {str(key): plain(below) for key, below in value.items()}
    if isinstance(value, list):
        return [plain(below) for below in value]
    return value


def listed(value):
    return value if isinstance(value, list) else [value]


def policy(template):
    written = json.loads((DEPLOY / "iam-policy.json").read_text())
    (inline,) = template["Resources"]["Role"]["Properties"]["Policies"]
    assert plain(inline["PolicyDocument"]) == written, "the template's policy is not iam-policy.json"
    tagged = ("aws:ResourceTag/shardfs:cluster", "aws:RequestTag/shardfs:cluster")
    for statement in written["Statement"]:
        assert statement["Effect"] == "Allow"
        resources, actions = listed(statement["Resource"]), listed(statement["Action"])
        assert not any("*" in action for action in actions), f"{statement['Sid']}: actions are named one by one"
        if "*" in resources:
            assert all(ON_EVERYTHING.fullmatch(action) for action in actions), f"{statement['Sid']} is for everything"
        else:
            keys = statement["Condition"]["StringEquals"]
            assert any(tag in keys for tag in tagged), f"{statement['Sid']} is not of the cluster alone"


def user_data(template):
    mark = re.compile(r"\$\{[A-Za-z0-9:.]+\}")
    datas = {"cloud-init/node.yaml": (DEPLOY / "cloud-init/node.yaml").read_text()}
    for number in (1, 2, 3):
        text = template["Resources"][f"Node{number}"]["Properties"]["UserData"]["Fn::Base64"]["Fn::Sub"]
        datas[f"Node{number}"] = text
    commands = {}
    for name, text in datas.items():
        assert text.startswith("#cloud-config\n"), f"{name}: cloud-init does not know what it is"
        assert len(text.encode()) < 16384, f"{name}: EC2 takes 16 KiB"
        data = yaml.safe_load(mark.sub("x", text))
        assert set(data) == {"package_update", "packages", "runcmd"}, f"{name}: {set(data)}"
        assert all(isinstance(word, str) for command in data["runcmd"] for word in command), f"{name}: words are strings"
        commands[name] = data["runcmd"]
    # The nodes differ in their own name only.
    strip = lambda name: json.dumps(commands[name]).replace(name.replace("Node", "node-") + '"', "self")
    assert strip("Node1") == strip("Node2") == strip("Node3"), "nodes are made differently"
    for name, of_node in commands.items():
        last = of_node[-1]
        assert last[0] == "/usr/lib/shardfs/bootstrap" and "--peers" in last and "--id" in last, f"{name}: {last}"


template = cfnlint.decode.cfn_yaml.load(str(DEPLOY / "cloudformation/shardfs.yaml"))
policy(template)
user_data(template)
