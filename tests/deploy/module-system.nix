# A stand-in for NixOS's module system, as far as deploy/nixos/rankgate.nix uses it: options with defaults and types that are checked,
# mkIf and mkMerge. It knows one module and one configuration. NixOS itself is not here.
#
#   nix-instantiate --eval --strict --json module-system.nix --arg module ../../deploy/nixos/rankgate.nix --arg settings '{ ... }'
{ module, settings }:

let
  type = name: check: { inherit name check; };

  types = {
    package = type "package" (v: builtins.isString v || builtins.isPath v || v ? outPath);
    str = type "str" builtins.isString;
    bool = type "bool" builtins.isBool;
    attrs = type "attrs" builtins.isAttrs;
    port = type "port" (v: builtins.isInt v && v >= 0 && v <= 65535);
    strMatching = pattern: type "strMatching ${pattern}" (v: builtins.isString v && builtins.match pattern v != null);
    listOf = of: type "listOf ${of.name}" (v: builtins.isList v && builtins.all of.check v);
    attrsOf = of: type "attrsOf ${of.name}" (v: builtins.isAttrs v && builtins.all of.check (builtins.attrValues v));
    nullOr = of: of // { name = "nullOr ${of.name}"; check = v: v == null || of.check v; };
    submodule = m: type "submodule" builtins.isAttrs // { inherit (m) options; };
    numbers.positive = type "positive number" (v: (builtins.isInt v || builtins.isFloat v) && v > 0);
    ints = {
      unsigned = type "unsigned int" (v: builtins.isInt v && v >= 0);
      positive = type "positive int" (v: builtins.isInt v && v > 0);
      between = low: high: type "int from ${toString low} to ${toString high}" (v: builtins.isInt v && v >= low && v <= high);
    };
  };

  lib = {
    inherit types;
    mkOption = option: option // { _option = true; };
    mkEnableOption = what: { _option = true; type = types.bool; default = false; description = "Whether to enable ${what}."; };
    mkIf = condition: content: { _if = condition; inherit content; };
    mkMerge = contents: { _merge = contents; };
  };

  # The values of a tree of options; every option needs a description, and what is set must exist and fit.
  evaluate = path: options: given:
    let unknown = builtins.filter (name: !(options ? ${name})) (builtins.attrNames given);
    in
    if unknown != [ ] then throw "The option `${path}.${builtins.head unknown}' does not exist."
    else builtins.mapAttrs
      (name: option:
        let place = "${path}.${name}";
        in
        if !(option ? _option) then evaluate place option (given.${name} or { })
        else if !(option ? description) then throw "The option `${place}' has no description."
        else if !(given ? ${name} || option ? default) then throw "The option `${place}' is used but not defined."
        else
          let value = if given ? ${name} then given.${name} else option.default;
          in
          if !option.type.check value
          then throw "A definition for option `${place}' is not of type `${option.type.name}'."
          else if option.type ? options && value != null then evaluate place option.type.options value
          else value)
      options;

  resolve = value:
    if !builtins.isAttrs value then value
    else if value ? _if then (if value._if then resolve value.content else { })
    else if value ? _merge then builtins.foldl' (all: one: all // resolve one) { } value._merge
    else if value ? outPath then value
    else builtins.mapAttrs (_: resolve) value;

  config.services.rankgate = evaluate "services.rankgate" made.options.services.rankgate settings;
  pkgs.writeText = builtins.toFile;
  made = import module { inherit config lib pkgs; };
  result = resolve made.config;
  failed = builtins.filter (one: !one.assertion) (result.assertions or [ ]);
in
{
  failed = map (one: one.message) failed;
  services = if failed == [ ] then result.systemd.services or { } else { };
  options = config.services.rankgate;
}
