# rankgate on NixOS: planners and runners as systemd services, the same as in deploy/systemd.
#
#   imports = [ ./rankgate.nix ];
#   services.rankgate = {
#     package = ...;                                  # a derivation with bin/rankgate
#     redis.host = "store.example";
#     instance = { name = "demo"; worldSize = 4; };
#     planner = { enable = true; passwordFile = "/run/secrets/rankgate-planner"; };
#     runner = { enable = true; ranks = [ 0 1 ]; passwordFile = "/run/secrets/rankgate-demo"; };
#   };
{ config, lib, pkgs, ... }:

let
  inherit (lib) mkEnableOption mkIf mkMerge mkOption types;

  cfg = config.services.rankgate;

  instanceFile = pkgs.writeText "rankgate-instance.toml" ''
    name = ${builtins.toJSON cfg.instance.name}
    world_size = ${toString cfg.instance.worldSize}
    model_id = ${builtins.toJSON cfg.instance.model}
    layers = ${toString cfg.instance.layers}
  '';

  # systemd reads % as a specifier in environments, and $ as a variable in commands, too (as utils.escapeSystemdExecArgs of NixOS).
  literal = builtins.replaceStrings [ "%" ] [ "%%" ];
  commandOf = arguments: builtins.concatStringsSep " "
    (map (argument: builtins.replaceStrings [ "%" "$" ] [ "%%" "$$" ] (builtins.toJSON argument)) arguments);

  urlOf = user:
    "${if cfg.redis.tls then "rediss" else "redis"}://${user}@${cfg.redis.host}:${toString cfg.redis.port}/${toString cfg.redis.database}${cfg.redis.query}";

  environmentOf = name: user: {
    RANKGATE_REDIS = literal (urlOf user);
    RANKGATE_NAMESPACE = cfg.namespace;
    RANKGATE_LEASE = toString cfg.lease;
    RANKGATE_HEARTBEAT = toString cfg.heartbeat;
    RANKGATE_WAIT_FOR_STORE = toString cfg.waitForStore;
    RANKGATE_STATE_FILE = "/run/${name}/state";
    RANKGATE_REDIS_PASSWORD_FILE = "%d/redis-password";
    # After a hang, the journal shows the file and the line.
    PYTHONFAULTHANDLER = "1";
  };

  unitOf = description: {
    inherit description;
    wantedBy = [ "multi-user.target" ];
    wants = [ "network-online.target" ];
    after = [ "network-online.target" ];
    # Without a limit on restarts: after a long outage of the store, systemd still starts the unit again.
    startLimitIntervalSec = 0;
  };

  # Each service has its own user, which exists while it runs, and gets only the rights that it needs. deploy/systemd gives the reasons.
  serviceOf = name: passwordFile: {
    Type = "notify";
    NotifyAccess = "main";
    LoadCredential = "redis-password:${passwordFile}";
    WatchdogSec = cfg.watchdogSec;
    Restart = "always";
    RestartSec = 2;
    TimeoutStartSec = 120;
    TimeoutAbortSec = 10;
    KillMode = "mixed";
    DynamicUser = true;
    RuntimeDirectory = name;
    UMask = "0077";
    LimitCORE = 0;
    AmbientCapabilities = "";
    CapabilityBoundingSet = "";
    DevicePolicy = "closed";
    KeyringMode = "private";
    LockPersonality = true;
    NoNewPrivileges = true;
    PrivateDevices = true;
    PrivateMounts = true;
    PrivateTmp = true;
    PrivateUsers = true;
    ProcSubset = "pid";
    ProtectClock = true;
    ProtectControlGroups = true;
    ProtectHome = true;
    ProtectHostname = true;
    ProtectKernelLogs = true;
    ProtectKernelModules = true;
    ProtectKernelTunables = true;
    ProtectProc = "invisible";
    ProtectSystem = "strict";
    RemoveIPC = true;
    RestrictAddressFamilies = "AF_UNIX AF_INET AF_INET6";
    RestrictNamespaces = true;
    RestrictRealtime = true;
    RestrictSUIDSGID = true;
    SystemCallArchitectures = "native";
    SystemCallErrorNumber = "EPERM";
  };

  plannerService = unitOf "rankgate planner" // {
    environment = environmentOf "rankgate-planner" cfg.planner.user
      // (if cfg.instance != null then { RANKGATE_INSTANCE_FILE = "${instanceFile}"; } else { });
    serviceConfig = serviceOf "rankgate-planner" cfg.planner.passwordFile // {
      ExecStart = commandOf [
        "${cfg.package}/bin/rankgate"
        "planner"
        "--assemble-timeout"
        (toString cfg.planner.assembleTimeout)
        "--max-failures"
        (toString cfg.planner.maxFailures)
      ];
      TimeoutStopSec = 30;
      MemoryDenyWriteExecute = true;
      SystemCallFilter = [ "@system-service" "~@privileged @resources" ];
    };
  };

  runnerService = rank:
    let name = "rankgate-runner-${toString rank}";
    in unitOf "rankgate runner, rank ${toString rank}" // {
      environment = environmentOf name cfg.runner.user // {
        RANKGATE_INSTANCE_FILE = "${instanceFile}";
      } // builtins.mapAttrs (_: literal) cfg.runner.environment;
      serviceConfig = serviceOf name cfg.runner.passwordFile // {
        ExecStart = commandOf [
          "${cfg.package}/bin/rankgate"
          "runner"
          "--rank"
          (toString rank)
          "--address"
          cfg.runner.address
          "--engine"
          cfg.runner.engine
          "--engine-config"
          (builtins.toJSON cfg.runner.engineConfig)
        ];
        TimeoutStopSec = 60;
        # @resources stays allowed: engines bind themselves to processors and memory.
        SystemCallFilter = [ "@system-service" "~@privileged" ];
      } // (if cfg.runner.deviceAllow == [ ] then { } else {
        PrivateDevices = false;
        DeviceAllow = cfg.runner.deviceAllow;
        SupplementaryGroups = [ "video" "render" ];
        ProcSubset = "all";
        LimitMEMLOCK = "infinity";
      });
    };

  runners = builtins.listToAttrs (map
    (rank: {
      name = "rankgate-runner-${toString rank}";
      value = runnerService rank;
    })
    cfg.runner.ranks);

  distinct = list: builtins.length (builtins.attrNames (builtins.listToAttrs (map
    (item: {
      name = toString item;
      value = null;
    })
    list))) == builtins.length list;

  # Every user of the machine can read the Nix store.
  secret = path: path != null && builtins.substring 0 1 path == "/" && builtins.match "${builtins.storeDir}/.*" path == null;

  secretMessage = who: path:
    "services.rankgate.${who}.passwordFile is ${if path == null then "not set" else path}; it must be an absolute path outside the "
    + "Nix store, which every user can read: use a file that sops-nix, agenix or you put there";
in
{
  options.services.rankgate = {
    package = mkOption {
      type = types.package;
      description = "The package with bin/rankgate: rankgate with its extra cli, and what the engine needs.";
    };

    namespace = mkOption {
      type = types.strMatching "[a-z0-9][a-z0-9-]{0,62}";
      default = "rankgate";
      description = "Keeps several clusters on one server apart. The same on every machine.";
    };

    redis = {
      host = mkOption {
        type = types.str;
        example = "store.example";
        description = "The Redis or Valkey server: a host name or an address.";
      };
      port = mkOption {
        type = types.port;
        default = 6379;
        description = "Its port.";
      };
      database = mkOption {
        type = types.ints.unsigned;
        default = 0;
        description = "Its database.";
      };
      tls = mkOption {
        type = types.bool;
        default = false;
        description = "Whether to connect with TLS.";
      };
      query = mkOption {
        type = types.str;
        default = "";
        example = "?ssl_ca_certs=/etc/ssl/store-ca.pem";
        description = "The rest of the URL, beginning with the question mark. Put no secret in here.";
      };
    };

    lease = mkOption {
      type = types.numbers.positive;
      default = 6;
      description = "Seconds after which a silent rank counts as gone. The same on every machine.";
    };

    heartbeat = mkOption {
      type = types.numbers.positive;
      default = 2;
      description = "Seconds between two reports of a rank; at most a third of the lease.";
    };

    waitForStore = mkOption {
      type = types.ints.unsigned;
      default = 60;
      description = "Seconds for which a process waits at its start for a server that is not up yet; at most 100.";
    };

    watchdogSec = mkOption {
      type = types.ints.positive;
      default = 30;
      description = "Seconds after which systemd restarts a process whose event loop hangs, or that no longer tries to work.";
    };

    instance = mkOption {
      type = types.nullOr (types.submodule {
        options = {
          name = mkOption {
            type = types.strMatching "[a-z0-9][a-z0-9-]{0,62}";
            description = "The instance's name.";
          };
          worldSize = mkOption {
            type = types.ints.between 1 16384;
            description = "Number of ranks.";
          };
          model = mkOption {
            type = types.str;
            default = "simulated";
            description = "The name that the engine knows the model by.";
          };
          layers = mkOption {
            type = types.ints.between 1 10000;
            default = 16;
            description = "How many layers the model has.";
          };
        };
      });
      default = null;
      description = "The instance of this cluster. Runners run its ranks. Planners launch it unless it was stopped or given up. The same on every machine.";
    };

    planner = {
      enable = mkEnableOption "a planner; if several planners use one server, one leads and the others stand by";
      user = mkOption {
        type = types.str;
        default = "${cfg.namespace}.planner";
        description = "The planner's user in the store, as rankgate acl calls it.";
      };
      passwordFile = mkOption {
        type = types.nullOr types.str;
        default = null;
        example = "/run/secrets/rankgate-planner";
        description = "A file with that user's password on the first line, outside the Nix store. Read by systemd as root.";
      };
      assembleTimeout = mkOption {
        type = types.numbers.positive;
        default = 120;
        description = "Seconds to wait for ranks that are not here at all.";
      };
      maxFailures = mkOption {
        type = types.ints.unsigned;
        default = 3;
        description = "How many failed attempts one rank may cause in a row.";
      };
    };

    runner = {
      enable = mkEnableOption "runners of the instance's ranks on this machine";
      ranks = mkOption {
        type = types.listOf types.ints.unsigned;
        default = [ ];
        example = [ 0 1 ];
        description = "The ranks that run on this machine, one service each. No two machines may run the same rank.";
      };
      user = mkOption {
        type = types.str;
        default = if cfg.instance == null then "" else "${cfg.namespace}.${cfg.instance.name}.ranks";
        description = "The runners' user in the store, as rankgate acl calls it.";
      };
      passwordFile = mkOption {
        type = types.nullOr types.str;
        default = null;
        example = "/run/secrets/rankgate-demo";
        description = "A file with that user's password on the first line, outside the Nix store. Read by systemd as root.";
      };
      address = mkOption {
        type = types.str;
        default = "";
        example = "node-a.example";
        description = "The name or address at which the other ranks reach this machine; by default the address from which it reaches the server.";
      };
      engine = mkOption {
        type = types.str;
        default = "simulated";
        example = "my_engine:make";
        description = "simulated, or module:factory of a callable that returns a runner.Engine.";
      };
      engineConfig = mkOption {
        type = types.attrs;
        default = { };
        description = "The engine's configuration. It is in the Nix store: put no secret in here.";
      };
      environment = mkOption {
        type = types.attrsOf types.str;
        default = { };
        description = "Further environment variables for the runners and their engines. Put no secret in here.";
      };
      deviceAllow = mkOption {
        type = types.listOf types.str;
        default = [ ];
        example = [ "char-nvidia rw" "char-nvidia-uvm rw" "char-drm rw" ];
        description = "The devices that the engine needs. If the list is not empty, the sandbox allows what GPUs need.";
      };
    };
  };

  config = mkIf (cfg.planner.enable || cfg.runner.enable) {
    assertions = [
      {
        assertion = cfg.heartbeat * 3 <= cfg.lease;
        message = "services.rankgate.heartbeat is ${toString cfg.heartbeat} s and lease is ${toString cfg.lease} s; the heartbeat must be at most a third of the lease, so that two may be lost";
      }
      {
        assertion = cfg.waitForStore <= 100;
        message = "services.rankgate.waitForStore is ${toString cfg.waitForStore} s; systemd gives a start 120 s, so it must be at most 100";
      }
      {
        assertion = builtins.match "[^@/ ]+" cfg.redis.host != null;
        message = "services.rankgate.redis.host is ${cfg.redis.host}; it must be a host name or an address alone: the user and the password have options of their own";
      }
      {
        assertion = !cfg.planner.enable || secret cfg.planner.passwordFile;
        message = secretMessage "planner" cfg.planner.passwordFile;
      }
      {
        assertion = !cfg.runner.enable || secret cfg.runner.passwordFile;
        message = secretMessage "runner" cfg.runner.passwordFile;
      }
      {
        assertion = !cfg.runner.enable || cfg.instance != null;
        message = "services.rankgate.runner is enabled and services.rankgate.instance is not set: say which instance the ranks are of";
      }
      {
        assertion = !cfg.runner.enable || cfg.runner.ranks != [ ];
        message = "services.rankgate.runner is enabled and services.rankgate.runner.ranks is empty: say which ranks run on this machine";
      }
      {
        assertion = distinct cfg.runner.ranks;
        message = "services.rankgate.runner.ranks names a rank twice; one process runs each rank";
      }
      {
        assertion = cfg.instance == null || builtins.all (rank: rank < cfg.instance.worldSize) cfg.runner.ranks;
        message = "services.rankgate.runner.ranks has a rank that is not below instance.worldSize; ranks are 0 to worldSize - 1";
      }
    ];

    systemd.services = mkMerge [
      (mkIf cfg.planner.enable { rankgate-planner = plannerService; })
      (mkIf cfg.runner.enable runners)
    ];
  };
}
