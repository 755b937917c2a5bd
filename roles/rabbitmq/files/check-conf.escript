%% Reads rabbitmq.conf as the broker does at its start, with the schemas of the plugins in this image,
%% and says what is wrong: escript check-conf.escript FILE. With --plugins, FILE is a list of plugins,
%% all of which the image must have.
main(["--plugins", File]) ->
    {ok, [Plugins]} = file:consult(File),
    case [Plugin || Plugin <- Plugins, plugin_files("ebin/" ++ atom_to_list(Plugin) ++ ".app") =:= []] of
        [] -> ok;
        Missing ->
            io:format(standard_error, "no such plugins in this image: ~p~n", [Missing]),
            halt(1)
    end;
main([File]) ->
    code:add_paths(plugin_files("ebin")),
    Schema = cuttlefish_schema:files(plugin_files("priv/schema/*.schema")),
    case cuttlefish_conf:file(File) of
        {errorlist, Errors} -> fail(Errors);
        Conf ->
            case cuttlefish_generator:map(Schema, Conf) of
                {error, _Phase, {errorlist, Errors}} -> fail(Errors);
                _ -> ok
            end
    end.

%% The official image has its plugins in the first folder, Debian's package in the second.
plugin_files(Name) ->
    [File || Home <- ["/opt/rabbitmq", "/usr/lib/rabbitmq/lib/rabbitmq_server-*"],
             File <- filelib:wildcard(Home ++ "/plugins/*/" ++ Name)].

fail(Errors) ->
    [io:format(standard_error, "~ts~n", [cuttlefish_error:xlate(Error)]) || {error, Error} <- Errors],
    halt(1).
